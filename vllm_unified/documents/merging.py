"""What a page break has cut, as a model says that was trained for it: which elements go on, and two tables as one.

OCRFlux's way (https://github.com/chatdoc-com/OCRFlux, ocrflux/client.py), but that no answer is run as a program, and
that one which cannot be costs the document nothing.
"""

import re
from asyncio import to_thread
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

from vllm_unified.documents.answers import SPECIAL_TOKEN, printable
from vllm_unified.documents.engine import EngineError
from vllm_unified.documents.joining import Joint, elements, merged_table
from vllm_unified.documents.options import Options
from vllm_unified.documents.page import Block, Page
from vllm_unified.documents.profiles import Merge, Profile, pairs_prompt, sampling, tables_prompt
from vllm_unified.documents.reading import Ask, request_of

LONGEST_QUESTION = 100_000  # characters; contexts that hold more are not these models'
LONGEST_PAIRS = 1000  # characters of an answer
MOST_PAIRS_TOKENS = 512

_PAIR = r"[(\[]\s*+([0-9]{1,4})\s*+,\s*+([0-9]{1,4})\s*+[)\]]"
_EACH_PAIR = re.compile(_PAIR)
_PAIRS = re.compile(rf"\[\s*+(?:{_PAIR}\s*+(?:,\s*+(?=[(\[])|(?=\])))*+\]")

Understood = TypeVar("Understood")


class _Shown(NamedTuple):
    """An element that the model is shown, and which of the page's it is."""

    at: int
    block: Block


async def joints(
    ask: Ask, first: Page, second: Page, options: Options, profile: Profile, *, max_model_len: int | None = None
) -> tuple[Joint, ...] | None:
    """What goes on from one page in the next; None where there is nothing to ask, or too much.

    The model is asked again, warmer, as often as `options.retries`. Raises EngineError where no good answer was had.
    """
    upper, lower = await to_thread(_shown, first), await to_thread(_shown, second)
    if profile.merge is None or not upper or not lower:
        return None
    model = _Model(ask, options, profile, profile.merge, max_model_len)
    prompt = pairs_prompt(profile.merge, *([each.block.text for each in page] for page in (upper, lower)))
    if len(prompt) > LONGEST_QUESTION:
        return None
    pairs = await model.answer(prompt, pairs_in, max_tokens=MOST_PAIRS_TOKENS)
    # A pair that names what is not there is no word about the others.
    found = [(upper[above], lower[below]) for above, below in pairs if above < len(upper) and below < len(lower)]
    return tuple([Joint(above.at, below.at, await model.table(above.block, below.block)) for above, below in found])


def pairs_in(answer: str) -> list[tuple[int, int]] | None:
    """`[(3, 0), (4, 2)]`, or with JSON's brackets; None for anything else. No element goes on twice."""
    text = SPECIAL_TOKEN.sub("", answer[:LONGEST_PAIRS]).strip()
    if len(answer) > LONGEST_PAIRS or not _PAIRS.fullmatch(text):
        return None
    pairs = [(int(first), int(second)) for first, second in _EACH_PAIR.findall(text)]
    is_once = all(len(set(numbers)) == len(pairs) for numbers in zip(*pairs, strict=True))
    return pairs if is_once else None


class _Model(NamedTuple):
    ask: Ask
    options: Options
    profile: Profile
    merge: Merge
    max_model_len: int | None

    async def table(self, upper: Block, lower: Block) -> str:
        """Both as one; "" where they are no tables, or the model cannot tell."""
        prompt = tables_prompt(self.merge, upper.html, lower.html)
        if not upper.html or not lower.html or len(prompt) > LONGEST_QUESTION:
            return ""
        try:
            return await self.answer(prompt, partial(_table_in, upper.html, lower.html))
        except EngineError:
            return ""

    async def answer(self, prompt: str, understood: Callable[[str], Understood | None], **fields: int) -> Understood:
        """The first that is understood. Raises EngineError where none is."""
        problem = ""
        for attempt in range(1 + self.options.retries):
            try:
                answer = await self.ask(self._request(prompt, round(0.1 * attempt, 1)) | fields)
            except EngineError as error:
                if not error.again:
                    raise
                problem = str(error)
                continue
            if answer.finish_reason == "length":  # it would be as long another time
                raise EngineError("the model's answer was cut off")
            found = await to_thread(understood, answer.text)
            if found is not None:
                return found
            problem = "the model's answer is not in its own form"
        raise EngineError(problem)

    def _request(self, prompt: str, temperature: float) -> dict[str, object]:
        profile = self.profile
        asked = sampling(
            self.options, profile, temperature=temperature, stronger=False, max_model_len=self.max_model_len
        )
        return request_of(
            prompt,
            self.merge.image,
            "image/png",
            asked,
            image_first=profile.image_first,
            system=profile.system,
        )


def _shown(page: Page) -> list[_Shown]:
    """All but the figures: the model was trained on pages without them."""
    return [_Shown(index, block) for index, block in enumerate(elements(page)) if block.text.strip()]


def _table_in(first: str, second: str, answer: str) -> str | None:
    text = printable(SPECIAL_TOKEN.sub("", answer)).strip()
    if not text.startswith("<table") or not text.endswith("</table>"):
        return None
    return merged_table(first, second, text) or None
