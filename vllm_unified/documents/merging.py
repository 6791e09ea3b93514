"""What a page break has cut, as a model says that was trained for it: which elements go on, and two tables as one.

OCRFlux's way (https://github.com/chatdoc-com/OCRFlux, ocrflux/client.py), but that no answer is run as a program, and
that one which cannot be costs the document nothing.
"""

import logging
import re
from asyncio import to_thread
from collections.abc import Callable, Sequence
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
log = logging.getLogger(__name__)


class _Shown(NamedTuple):
    """An element that the model is shown, and which of the page's it is."""

    at: int
    block: Block


async def joints(
    ask: Ask, first: Page, second: Page, options: Options, profile: Profile, *, max_model_len: int | None = None
) -> tuple[Joint, ...] | None:
    """What goes on from one page in the next; None where the model gave no good answer, or was not asked.

    It is asked again, warmer, as often as `options.retries`. Raises nothing for what the engine or the model says.
    """
    upper, lower = await to_thread(_shown, first), await to_thread(_shown, second)
    if profile.merge is None or not upper or not lower:
        return None
    model = _Model(ask, options, profile, profile.merge, max_model_len)
    pairs = await model.pairs(upper, lower)
    if pairs is None:
        return None
    return tuple([Joint(above.at, below.at, await model.table(above, below)) for above, below in pairs])


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

    async def pairs(self, upper: Sequence[_Shown], lower: Sequence[_Shown]) -> list[tuple[_Shown, _Shown]] | None:
        prompt = pairs_prompt(self.merge, *([each.block.text for each in page] for page in (upper, lower)))
        pairs = await self._answer(prompt, pairs_in, max_tokens=MOST_PAIRS_TOKENS)
        if pairs is None:
            return None
        # One that names what is not there is no word about the others.
        return [(upper[above], lower[below]) for above, below in pairs if above < len(upper) and below < len(lower)]

    async def table(self, upper: _Shown, lower: _Shown) -> str:
        """Both as one; "" where they are no tables, or the model cannot tell."""
        first, second = upper.block.html, lower.block.html
        if not first or not second:
            return ""
        merged = partial(_table_in, first, second)
        return await self._answer(tables_prompt(self.merge, first, second), merged) or ""

    async def _answer(
        self, prompt: str, understood: Callable[[str], Understood | None], **fields: int
    ) -> Understood | None:
        """The first answer that can be understood. One that was cut off would be as long another time."""
        if len(prompt) > LONGEST_QUESTION:
            return None
        for attempt in range(1 + self.options.retries):
            try:
                answer = await self.ask(self._request(prompt, round(0.1 * attempt, 1)) | fields)
            except EngineError as error:
                log.info("a question about a page break: %s", error)
                if error.again:
                    continue
                return None
            if answer.finish_reason == "length":
                return None
            found = await to_thread(understood, answer.text)
            if found is not None:
                return found
        return None

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
