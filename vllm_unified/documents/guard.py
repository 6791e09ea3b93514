"""Whether the guard against repetition works with this engine: asked when it has nothing else to do.

vLLM takes `vllm_xargs` that no logits processor reads, and says nothing of it. What tells is a number that the
processor alone refuses, and then an answer in whose tokens no pair may come twice.
(vllm/model_executor/models/deepseek_ocr.py: NGramPerReqLogitsProcessor)
"""

import io
from collections.abc import Awaitable, Callable, Collection, Sequence
from itertools import pairwise
from typing import Any

import msgspec
from PIL import Image, ImageDraw, ImageFont

from vllm_unified.documents import profiles
from vllm_unified.documents.engine import Answer, EngineError
from vllm_unified.documents.options import Options
from vllm_unified.documents.profiles import Profile
from vllm_unified.documents.reading import request_of

PROCESSOR = "vllm.model_executor.models.deepseek_ocr:NGramPerReqLogitsProcessor"
BY_ENGINE = "the engine keeps its answers from repeating themselves"
BY_SERVICE = "the model has no such guard of its own; answers that repeat themselves are cut and asked for again"
PASSED_OVER = (
    "the engine passes ngram_size over, so only answers that repeat themselves are cut and asked for again; put "
    f'"logits-processors": ["{PROCESSOR}"] into engine_args of the model, then ./deploy.sh reload'
)
WITHOUT_EFFECT = (
    "the engine takes ngram_size and repeats itself all the same; put "
    '"VLLM_USE_V2_MODEL_RUNNER": "0" into env of the model, then ./deploy.sh reload'
)
NO_FINISH_REASON = (
    "the engine does not say where an answer was cut off (finish_reason), so that few loops are found; "
    "serve the model with vLLM, or with a server that says it"
)
REFUSED = frozenset({400, 422})
LONGEST_ANSWER = 64  # tokens: what a reader of the picture says twice before it has read a third of it
TEXT = "\n".join(["la la la la la la la la"] * 12)

Ask = Callable[[dict[str, Any]], Awaitable[Answer]]


class Guard(msgspec.Struct, frozen=True):
    """`works` is None where it is not known. `message`: in one line what there is, or what to do."""

    works: bool | None
    message: str


UNTESTED = Guard(None, "not tested yet; it is when the engine is ready and has nothing else to do")


async def tested(ask: Ask, profile: Profile, options: Options) -> Guard:
    """At most LONGEST_ANSWER tokens of the engine. `options`: those of a document for which nothing was asked."""
    try:
        return await (_of_engine if profile.guard else _of_service)(ask, profile, options)
    except EngineError as error:
        words = "".join(letter if letter.isprintable() else " " for letter in str(error))
        if error.status not in REFUSED:
            return Guard(None, f"not tested: {words}")
        return Guard(
            False, f"{words}; so it refuses every page: see to engine_args of the model, then ./deploy.sh reload"
        )


async def _of_engine(ask: Ask, profile: Profile, options: Options) -> Guard:
    request = _request(profile, options, stronger=False)
    xargs = request["vllm_xargs"]
    try:
        await ask({**request, "max_tokens": 1, "vllm_xargs": {**xargs, "ngram_size": 0}})
    except EngineError as error:
        if error.status not in REFUSED:
            raise
    else:
        return Guard(False, PASSED_OVER)
    strictest = {**xargs, "ngram_size": 2, "window_size": 2 * LONGEST_ANSWER}
    answer = await ask({**request, "max_tokens": LONGEST_ANSWER, "vllm_xargs": strictest, "return_token_ids": True})
    if has_pair_twice(answer.token_ids, profile.whitelist):
        return Guard(False, WITHOUT_EFFECT)
    return Guard(True, BY_ENGINE)


async def _of_service(ask: Ask, profile: Profile, options: Options) -> Guard:
    answer = await ask({**_request(profile, options, stronger=True), "max_tokens": 1})
    if answer.text and answer.completion_tokens == 1 and answer.finish_reason != "length":
        return Guard(False, NO_FINISH_REASON)
    return Guard(True, BY_SERVICE)


def has_pair_twice(tokens: Sequence[int], whitelist: Collection[int]) -> bool:
    """Of neighbours, but for those whose second may repeat."""
    pairs = [pair for pair in pairwise(tokens) if pair[1] not in whitelist]
    return len(set(pairs)) < len(pairs)


def _request(profile: Profile, options: Options, *, stronger: bool) -> dict[str, Any]:
    """As a page is asked for."""
    return request_of(
        profiles.prompt_of(options, profile),
        _picture(),
        "image/png",
        profiles.sampling(options, profile, temperature=0.0, stronger=stronger),
        image_first=profile.image_first,
        system=profile.system,
    )


def _picture() -> bytes:
    """What makes a reader repeat itself."""
    image = Image.new("L", (512, 512), "white")
    ImageDraw.Draw(image).text((20, 20), TEXT, fill="black", font=ImageFont.load_default(32))
    written = io.BytesIO()
    image.save(written, "PNG")
    return written.getvalue()
