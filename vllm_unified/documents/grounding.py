"""What a model wrote of a page, with the places where it read it, to blocks.

DeepSeek-OCR's form is `<|ref|>label<|/ref|><|det|>[[x1, y1, x2, y2]]<|/det|>` and then the block's text, up to the
next one. An answer may be cut off anywhere, and nothing in it is trusted: numbers are literal, time is linear.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from vllm_unified.documents.page import FIGURES, RUNNING_HEADS, Block, Box
from vllm_unified.documents.tables import around_tables, without_loose_end

# https://github.com/deepseek-ai/DeepSeek-OCR: boxes are in thousandths of the page's sides, whatever they measure.
SCALE = 999
MOST_BOXES = 2_000
LONGEST_LABEL = 64
# What models call the parts of a page, beside names with an underscore, as sub_title. In "OCR this image" what
# stands for a label is the text of a line, and "number" is a word that lines have.
LABELS = (FIGURES | RUNNING_HEADS) - {"number"}
LABELS |= {"algorithm", "caption", "code", "equation", "footnote", "formula", "heading", "list", "paragraph"}
LABELS |= {"reference", "subtitle", "table", "text", "title"}

_REF, _REF_END, _DET, _DET_END = "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>"
# Longer than a bra-ket such as <|x|>, which is a text's own.
_SPECIAL = re.compile(r"<[|｜]/?[\w▁-]{3,64}[|｜]>")
# One as it should be is left alone, as answers have thousands of them.
_FOREIGN_TAG = re.compile(r"(?!<\|/?(?:ref|det)\|>)[<＜〈][|｜](/?)(ref|det)[|｜][>＞〉]")
# Without one of these there is no such tag. DeepSeek-OCR's own end of an answer has a full-width bar too.
_FOREIGN = ("＜", "〈", "<｜ref", "<｜/ref", "<｜det", "<｜/det", "ref｜", "det｜")
_BRACKETS = str.maketrans("（(［【〔〈〔）)］】〕〉，、．；", "[[[[[[[]]]]]],,.,")
_COORDINATES = re.compile(r"[\s\d\[\],.+-]*")
# How nearly all blocks begin, after the first tag: read at once.
_AS_IT_SHOULD_BE = re.compile(r"([^<]*)<\|/ref\|><\|det\|>(\[[0-9\[\], .-]*)<\|/det\|>")
_NUMBER = re.compile(r"-?\d{1,20}(?:\.\d{1,20})?")
_WORD = re.compile(r"\s*[A-Za-z_-]{0,64}")
# A place that is none is dropped up to this length; what is longer is text that was taken for a place.
_LONGEST_ODD = 256
_ODD = "?"


class Grounded(msgspec.Struct, frozen=True):
    """`blocks` in reading order; `warnings` say what of the answer was odd, a line for each kind."""

    blocks: tuple[Block, ...] = ()
    warnings: tuple[str, ...] = ()


def grounded(raw: str, width: int, height: int) -> Grounded:
    """The blocks of a model's answer about an image of `width` × `height` pixels. Never raises; time is linear.

    Text before the first block, and an answer without any place, is a block without label and boxes. A line of
    "OCR this image", or what "Locate" was asked for, is a block without label whose text it is. A table stands in a
    block of its own, whose `html` it is. Boxes are in pixels, within the image, their corners in order.
    """
    boxes = _Boxes(width, height)
    blocks = [block for part in _parts(raw) for block in _blocks(part, boxes.read(part.places))]
    return Grounded(tuple(_with_places_of_tables(blocks)), boxes.warnings())


@dataclass(slots=True)
class _Place:
    """What stands in a det, its brackets made plain. `is_whole`: the answer does not end within it."""

    coordinates: str
    is_whole: bool = True


@dataclass(slots=True)
class _Part:
    label: str
    text: str
    places: list[_Place] = field(default_factory=list)


def _parts(raw: str) -> Iterator[_Part]:
    before, *refs = _with_plain_tags(raw).split(_REF)
    yield from _dets("", before)
    for ref in filter(None, refs):
        whole = _AS_IT_SHOULD_BE.match(ref)
        if whole and ref.find(_DET, whole.end()) < 0:
            yield _Part(whole[1], ref[whole.end() :], [_Place(whole[2])])
            continue
        end, det = ref.find(_REF_END), ref.find(_DET)
        if det >= 0 and not 0 <= end < det:  # never closed
            yield from _dets(ref[:det], ref[det:])
        elif end >= 0:
            yield from _dets(ref[:end], ref[end + len(_REF_END) :])
        else:
            yield _Part("", ref)


def _with_plain_tags(raw: str) -> str:
    """Without full-width forms of the four tags, and without the beginning of one at the end."""
    if any(sign in raw for sign in _FOREIGN):
        raw = _FOREIGN_TAG.sub(r"<|\1\2|>", raw)
    last = raw.rfind("<")
    is_cut = last >= 0 and any(tag.startswith(raw[last:]) for tag in (_REF, _REF_END, _DET, _DET_END))
    return raw[:last] if is_cut and _REF in raw[:last] else raw


def _dets(label: str, rest: str) -> Iterator[_Part]:
    """The block of `label`; and one for each place that names its own label or comes after the text of another."""
    text, *dets = rest.split(_DET)
    part = _Part(label, text)
    for det in filter(None, dets):
        own_label, place, text = _det(det)
        is_other = bool(part.text.strip()) and (bool(part.places) or not part.label)
        if own_label or is_other:
            yield part
            part = _Part(own_label, "")
        part.places.append(place)
        part.text = part.text if text.isspace() else part.text + text
    yield part


def _det(det: str) -> tuple[str, _Place, str]:
    """The label in a det, which some models write there; what stands for its boxes; and the text after it."""
    closed = det.find(_DET_END)
    narrow = (det if closed < 0 else det[:closed]).translate(_BRACKETS)
    word = _match(_WORD, narrow, 0)
    coordinates = _match(_COORDINATES, narrow, len(word))
    end = len(word) + len(coordinates)
    is_list = coordinates.lstrip().startswith("[")
    label = word.strip() if is_list else ""
    if (is_list or not word.strip()) and end == closed:
        return label, _Place(coordinates), det[end + len(_DET_END) :]
    if is_list and 0 <= closed <= _LONGEST_ODD:
        return label, _Place(_ODD), det[closed + len(_DET_END) :]
    if not is_list:
        return "", _Place(_ODD), det
    end = _end_of_list(coordinates)
    after = det[len(word) + end :]
    return label, _Place(coordinates[:end], is_whole=bool(after)), after


def _match(pattern: re.Pattern[str], text: str, start: int) -> str:
    found = pattern.match(text, start)
    return found[0] if found else ""


def _end_of_list(run: str) -> int:
    """Where the list of boxes ends of which `run` is the beginning, when nothing else says so."""
    end = run.find("]]")
    if end >= 0:
        return len(run) - len(run[end:].lstrip("]"))
    end = run.rfind("]") + 1 or run.find("\n")
    return end if end > 0 else len(run)


def _blocks(part: _Part, boxes: tuple[Box, ...]) -> Iterator[Block]:
    label, text = _label(part.label), _cleaned(part.text)
    if _is_text(part.label.strip(), text):
        label, text = "", "\n".join(filter(None, [_cleaned(part.label), text]))
    if label in FIGURES:
        yield Block(label=label, boxes=boxes)
        if not text:
            return
        label, boxes = "text", ()
    if "<" in text:
        pieces = [(piece.strip(), is_table) for piece, is_table in around_tables(text) if piece.strip()]
        if any(is_table for _, is_table in pieces):
            yield from _around_tables(label, pieces, boxes)
            return
    if text or boxes:
        yield Block(label=label, text=text, boxes=boxes)


def _around_tables(label: str, pieces: list[tuple[str, bool]], boxes: tuple[Box, ...]) -> Iterator[Block]:
    """The boxes are the first table's where the label is; or else those of the text before it."""
    place_of_table = label == "table" or pieces[0][1]
    for piece, is_table in pieces:
        piece = without_loose_end(piece) if is_table else piece
        own = boxes if is_table == place_of_table else ()
        boxes = () if own else boxes
        if is_table:
            yield Block(label="table", text=piece, boxes=own, html=piece)
        else:
            yield Block(label="text" if label == "table" else label, text=piece, boxes=own)


def _with_places_of_tables(blocks: list[Block]) -> list[Block]:
    """DeepSeek-OCR names a table's place, then its caption's, and then writes both: the caption comes first."""
    placed: list[Block] = []
    empty: int | None = None  # where in `placed` a table stands that has a place, and no text yet
    for block in blocks:
        if block.html and not block.boxes and empty is not None:
            block = msgspec.structs.replace(block, boxes=placed.pop(empty).boxes)
        if block.label == "table" and not block.text:
            empty = len(placed)
        elif not block.label.endswith("caption"):
            empty = None
        placed.append(block)
    return placed


def _is_text(label: str, text: str) -> bool:
    """Whether what stands for a label is a text of the page."""
    if len(label) > LONGEST_LABEL:
        return True
    return not text and bool(label) and label not in LABELS and "_" not in label


def _label(label: str) -> str:
    return " ".join(_cleaned(label).split()).lower()[:LONGEST_LABEL]


def _cleaned(text: str) -> str:
    if "<|" in text or "<｜" in text:
        text = _SPECIAL.sub("", text)
    return text.strip()


@dataclass(slots=True)
class _Boxes:
    """Boxes out of the numbers of an answer, and what was wrong with them."""

    width: int
    height: int
    left: int = MOST_BOXES
    odd: int = 0
    empty: int = 0
    too_many: bool = False

    def read(self, places: list[_Place]) -> tuple[Box, ...]:
        if places and not self.left:
            self.too_many = True
            return ()
        return tuple(box for place in places for box in self._of_place(place))

    def warnings(self) -> tuple[str, ...]:
        found = {
            f"places that are no boxes, left out: {self.odd}": self.odd,
            f"boxes without an area, left out: {self.empty}": self.empty,
            f"more than {MOST_BOXES} boxes: the others are left out, their text is kept": self.too_many,
        }
        return tuple(text for text, is_so in found.items() if is_so)

    def _of_place(self, place: _Place) -> Iterator[Box]:
        if not self.left:
            self.too_many = True
            return
        if place.coordinates == _ODD:
            self.odd += 1
            return
        most = 4 * MOST_BOXES  # a box has no more lists than that
        *lists, last = place.coordinates.split("]", most)
        if len(lists) == most and "[" in last:
            self.too_many = True
        elif place.is_whole:
            lists.append(last)
        elif last:
            self.odd += 1
        for corners in self._corners(lists):
            if not self.left:
                self.too_many = True
                return
            box = self._box(*corners)
            if box:
                self.left -= 1
                yield box

    def _corners(self, lists: list[str]) -> Iterator[tuple[float, float, float, float]]:
        """x1, y1, x2, y2 of each list of four numbers, or of each two that are points."""
        point: list[float] = []
        for each in filter(None, lists):
            numbers = [float(number) for number in _NUMBER.findall(each, each.rfind("[") + 1)]
            if len(numbers) == 2:
                numbers = point + numbers
                point = numbers if len(numbers) == 2 else []
            if len(numbers) % 4:
                self.odd += numbers is not point
                continue
            for at in range(0, len(numbers), 4):
                x1, y1, x2, y2 = numbers[at : at + 4]
                yield x1, y1, x2, y2
        self.odd += bool(point)

    def _box(self, x1: float, y1: float, x2: float, y2: float) -> Box | None:
        left, right = sorted((_pixel(x1, self.width), _pixel(x2, self.width)))
        top, bottom = sorted((_pixel(y1, self.height), _pixel(y2, self.height)))
        if left < right and top < bottom:
            return left, top, right, bottom
        self.empty += 1
        return None


def _pixel(value: float, side: int) -> int:
    within = value if 0.0 <= value <= SCALE else min(max(value, 0.0), SCALE)
    return round(within / SCALE * side)
