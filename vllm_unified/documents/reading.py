"""One page: asked of the OCR model, its answer judged, asked again in other ways, and the best that came of it."""

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from vllm_unified.documents.answers import Rotation, Understand, Understood, noise_in, paragraphs, understood
from vllm_unified.documents.engine import Answer, EngineError
from vllm_unified.documents.options import Mode, Options
from vllm_unified.documents.page import Page
from vllm_unified.documents.profiles import Profile, prompt_of, sampling
from vllm_unified.documents.repetition import loop_at_end, without_loop

log = logging.getLogger(__name__)

# A chat completion's fields but for the model → the answer. Raises EngineError.
Ask = Callable[[dict[str, Any]], Awaitable[Answer]]
# Degrees clockwise → the page's image turned so, of the same media type.
Rotate = Callable[[Rotation], Awaitable[bytes]]

NOISY = 0.2
LONGEST_REFUSAL = 400
# fmt: off
_SORRY = (
    "i'm sorry", "i am sorry", "sorry,", "i cannot", "i can't", "i'm unable", "i am unable", "as an ai",
    "抱歉", "很抱歉", "对不起", "我无法", "无法识别",
)
# fmt: on
_OF_AN_IMAGE = ("image", "picture", "photo", "assist", "图", "照片")
# Of the characters of the page's text layer: less of an answer that has something wrong is no use.
LEAST_SHARE = 0.5
# The modes that say the same in another way; the last of them is the last that is tried.
_OTHER_MODES: Mapping[Mode, tuple[Mode, ...]] = {"markdown": ("ocr", "free"), "ocr": ("free",)}


class Step(NamedTuple):
    """One way of asking for a page."""

    mode: Mode
    stronger: bool = False  # the guard against repetition
    temperature: float = 0.0


class Problem(NamedTuple):
    """What is wrong with an answer; the best one has the least weight, and of those the most text."""

    weight: int
    words: str


TRUNCATED = Problem(3, "was cut off where the model's context ends")
TURNED = Problem(3, "is of a page that is not upright")
LOOPED = Problem(4, "repeats itself")
LOOP_CUT = Problem(4, "repeats itself at its end, which was left out")
NOISE = Problem(5, "is mostly special tokens")
REFUSED = Problem(5, "reads as if the model refused")
EMPTY = Problem(9, "is empty")
_MALFORMED = 2
FAILED = "the document service failed"


class _Sheet(NamedTuple):
    """What is sent of a page."""

    image: bytes
    width: int
    height: int
    rotation: Rotation = 0


class Attempt(msgspec.Struct, frozen=True):
    """An answer, and what is to be thought of it."""

    step: Step
    raw: str
    understood: Understood
    problems: tuple[Problem, ...]
    width: int
    height: int
    rotation: Rotation

    @property
    def weight(self) -> int:
        return max((problem.weight for problem in self.problems), default=0)

    @property
    def characters(self) -> int:
        return _characters(self.understood.markdown)


async def read_page(
    ask: Ask,
    image: bytes,
    media_type: str,
    width: int,
    height: int,
    number: int,
    options: Options,
    profile: Profile,
    *,
    understand: Understand,
    text_layer: str = "",
    rotate: Rotate | None = None,
    blank: bool = False,
    max_model_len: int | None = None,
) -> Page:
    """Never raises for what is wrong with a page: the page says it. `Page.markdown` has no links to figures yet.

    `image`: what is sent, `width` x `height` pixels. `understand` parses grounded answers. `blank`: nothing is on
    the image, so that an answer of nothing is right. `max_model_len`: the engine's context in tokens, if known.
    """
    reader = _Reader(ask, media_type, options, profile, understand, rotate, blank, max_model_len)
    try:
        await reader.read(_Sheet(image, width, height))
    except Exception as error:
        log.exception("page %d", number)
        reader.failures.append(f"{FAILED}: {type(error).__name__}")
    return reader.page(number, width, height, text_layer)


class _Reader:
    """The attempts at one page, and what they cost."""

    def __init__(
        self,
        ask: Ask,
        media_type: str,
        options: Options,
        profile: Profile,
        understand: Understand,
        rotate: Rotate | None,
        blank: bool,
        max_model_len: int | None,
    ) -> None:
        self._ask = ask
        self._media_type = media_type
        self._options = options
        self._profile = profile
        self._understand = understand
        self._rotate = rotate
        self._blank = blank
        self._max_model_len = max_model_len
        self._attempts: list[Attempt] = []
        self._asked = 0
        self._answers: list[Answer] = []
        self.failures: list[str] = []

    async def read(self, sheet: _Sheet) -> None:
        steps = ladder(self._options, self._profile)
        while steps:
            step = steps.pop(0)
            try:
                attempt = await self._attempt(sheet, step)
            except EngineError as error:
                self.failures.append(str(error))
                if error.again:
                    continue
                return
            if attempt.understood.rotation and not sheet.rotation and self._rotate is not None:
                self._attempts.append(msgspec.structs.replace(attempt, problems=(*attempt.problems, TURNED)))
                sheet = await _turned(sheet, attempt.understood.rotation, self._rotate)
                steps = ladder(self._options, self._profile)
                continue
            self._attempts.append(attempt)
            if not attempt.problems or (self._blank and EMPTY in attempt.problems):
                return
            if attempt.problems == (TRUNCATED,):  # nothing repeats, so a stronger guard would change nothing
                steps = [each for each in steps if each != step._replace(stronger=True)]

    async def _attempt(self, sheet: _Sheet, step: Step) -> Attempt:
        """Raises EngineError."""
        profile, options = self._profile, self._options
        fields = sampling(
            options,
            profile,
            temperature=step.temperature,
            stronger=step.stronger,
            max_model_len=self._max_model_len,
        )
        prompt = prompt_of(options, profile, step.mode)
        self._asked += 1
        answer = await self._ask(
            request_of(
                prompt,
                sheet.image,
                self._media_type,
                fields,
                image_first=profile.image_first,
                system=profile.system,
            )
        )
        self._answers.append(answer)
        # Some milliseconds for a long answer, in which other pages go on.
        return await asyncio.to_thread(judged, answer, step, sheet, profile, self._understand)

    def page(self, number: int, width: int, height: int, text_layer: str) -> Page:
        """The best that came of it."""
        page = Page(
            number,
            width,
            height,
            attempts=self._asked,
            prompt_tokens=sum(answer.prompt_tokens for answer in self._answers),
            completion_tokens=sum(answer.completion_tokens for answer in self._answers),
            seconds=sum(answer.seconds for answer in self._answers),
        )
        best = max(self._attempts, key=lambda each: (-each.weight, each.characters), default=None)
        if best is None:
            return _without_model(page, self.failures[-1], text_layer)
        page = msgspec.structs.replace(page, raw_text=best.raw)
        if self._blank and EMPTY in best.problems:
            return page
        if not _is_usable(best, text_layer):
            reason = "; ".join(f"the model's answer {problem.words}" for problem in best.problems)
            return _without_model(page, "; ".join([reason, *self.failures[-1:]]), text_layer)
        return msgspec.structs.replace(
            page,
            width=best.width,
            height=best.height,
            rotation=best.rotation,
            markdown=best.understood.markdown,
            blocks=best.understood.blocks,
            warnings=tuple(self._warnings(best)),
        )

    def _warnings(self, best: Attempt) -> Iterator[str]:
        yield from (f"the answer {problem.words}" for problem in best.problems)
        yield from best.understood.warnings
        if best.understood.rotation:
            yield f"the model says that the page is to be turned by {best.understood.rotation} degrees clockwise"
        if best.step.mode != self._options.mode:
            yield f'read in mode "{best.step.mode}", as mode "{self._options.mode}" gave no good answer'
        if best.problems and self.failures:
            yield f"not read again: {self.failures[-1]}"


def ladder(options: Options, profile: Profile) -> list[Step]:
    """The ways in which a page is asked for, the first one and as many as `options.retries` after it.

    A stronger guard against repetition, another mode, rising temperatures, and in the end without boxes.
    """
    first = Step(options.mode)
    prompts = {prompt_of(options, profile)}
    others = []
    for mode in _OTHER_MODES.get(options.mode, ()):
        if mode in profile.prompts and profile.prompts[mode] not in prompts:
            prompts.add(profile.prompts[mode])
            others.append(Step(mode, stronger=True))
    last = [others.pop()] if others and options.retries > 1 else []
    further = [first._replace(stronger=True), *others]
    warmer = [
        first._replace(stronger=True, temperature=round(0.1 * (count + 1), 1)) for count in range(options.retries)
    ]
    return [first, *[*further, *warmer][: options.retries - len(last)], *last]


def request_of(
    prompt: str,
    image: bytes,
    media_type: str,
    fields: Mapping[str, Any],
    *,
    image_first: bool = True,
    system: str | None = None,
) -> dict[str, Any]:
    """A chat completion's fields but for the model."""
    url = f"data:{media_type};base64,{base64.b64encode(image).decode('ascii')}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    said = [] if system is None else [{"role": "system", "content": system}]
    content = parts if image_first else parts[::-1]
    return {"messages": [*said, {"role": "user", "content": content}], **fields}


async def _turned(sheet: _Sheet, degrees: Rotation, rotate: Rotate) -> _Sheet:
    image = await rotate(degrees)
    upright = (sheet.width, sheet.height) if degrees == 180 else (sheet.height, sheet.width)
    return _Sheet(image, *upright, degrees)


# --- judging an answer ---


def judged(answer: Answer, step: Step, sheet: _Sheet, profile: Profile, understand: Understand) -> Attempt:
    ended = answer.finish_reason not in ("length", "repetition")
    loop = loop_at_end(answer.text, ended=ended)
    is_cut = loop is not None and loop.period > 0 and not ended
    text = without_loop(answer.text, loop) if loop is not None and is_cut else answer.text
    found = understood(text, profile.form, sheet.width, sheet.height, understand)
    problems = []
    if is_cut:
        problems.append(LOOP_CUT)
    elif loop is not None or answer.finish_reason == "repetition":
        problems.append(LOOPED)
    elif not ended:
        problems.append(TRUNCATED)
    if noise_in(answer.text) > NOISY:
        problems.append(NOISE)
    if not any(block.text or block.boxes for block in found.blocks):
        problems.append(EMPTY)
    elif _is_refusal(found.markdown):
        problems.append(REFUSED)
    if found.malformed and ended and step.mode != "prompt":
        problems.append(Problem(_MALFORMED, found.malformed))
    return Attempt(step, answer.text, found, tuple(problems), sheet.width, sheet.height, sheet.rotation)


def _is_refusal(text: str) -> bool:
    """A shop's sign may say sorry too; it does not speak of images."""
    if len(text) > LONGEST_REFUSAL:
        return False
    said = text.lstrip("#*_> ").replace("’", "'").lower()
    return said.startswith(_SORRY) and any(word in said for word in _OF_AN_IMAGE)


def _is_usable(best: Attempt, text_layer: str) -> bool:
    """A page that has its text in the file is not left with a part of it, or with an excuse."""
    if EMPTY in best.problems:
        return False
    return best.weight <= _MALFORMED or best.characters >= LEAST_SHARE * _characters(text_layer)


def _characters(text: str) -> int:
    return len("".join(text.split()))


def _without_model(page: Page, reason: str, text_layer: str) -> Page:
    text = text_layer.strip()
    if not text:
        return msgspec.structs.replace(page, source="nothing", reason=reason)
    return msgspec.structs.replace(
        page, source="text_layer", reason=reason, markdown=text, blocks=paragraphs(text_layer)
    )
