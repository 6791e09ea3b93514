"""How many tokens an answer took, read as it passes; a stream's last chunk is hidden where nobody asked for it."""

import msgspec

# An answer that is larger tells its tokens to nobody; the longest embeddings stay under it.
LARGEST_ANSWER = 32 << 20
# An event of a stream that is larger is passed on in parts.
LARGEST_EVENT = 1 << 20


class _Usage(msgspec.Struct):
    """OpenAI's names, and Anthropic's, whose `input_tokens` are those that were not in a cache."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None

    @property
    def counts(self) -> tuple[int, int]:
        """Prompt and completion tokens."""
        prompt = self.prompt_tokens if self.prompt_tokens is not None else self.input_tokens
        if prompt is not None:
            prompt += (self.cache_read_input_tokens or 0) + (self.cache_creation_input_tokens or 0)
        completion = self.completion_tokens if self.completion_tokens is not None else self.output_tokens
        if prompt is None:  # a reranker may say but the sum
            prompt = (self.total_tokens or 0) - (completion or 0)
        return max(0, prompt), max(0, completion or 0)


class _Inner(msgspec.Struct):
    usage: _Usage | None = None


class _Meta(msgspec.Struct):
    billed_units: _Usage | None = None


class _Answer(msgspec.Struct):
    """`response` and `message` hold the usage in events of Responses and of Messages, `meta` in Cohere's answers."""

    usage: _Usage | None = None
    meta: _Meta | None = None
    response: _Inner | None = None
    message: _Inner | None = None
    choices: list[msgspec.Raw] | None = None


_decoder = msgspec.json.Decoder(_Answer)


class AnswerTokens:
    """Of an answer that is one JSON document."""

    __slots__ = ("_parts", "_size")

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def take(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= LARGEST_ANSWER:
            self._parts.append(data)
        else:
            self._parts.clear()

    def counts(self) -> tuple[int, int]:
        parts = self._parts
        if not parts:
            return 0, 0
        try:
            answer = _decoder.decode(parts[0] if len(parts) == 1 else b"".join(parts))
        except (msgspec.MsgspecError, RecursionError):  # not for us to judge
            return 0, 0
        usage = answer.usage or (answer.meta.billed_units if answer.meta else None)
        return usage.counts if usage else (0, 0)


class StreamTokens:
    """Of a stream of server-sent events. `hide`: leave out the event that holds nothing but the usage.

    A stream that never told its usage, because its client left before the end, has as many completion tokens as
    pieces came: engines send a token or a few in each.
    """

    __slots__ = ("_hide", "_rest", "at_border", "completion", "pieces", "prompt")

    def __init__(self, *, hide: bool) -> None:
        self._hide = hide
        self._rest = b""
        self.at_border = True  # what went to the client so far ends with a whole event
        self.prompt = 0
        self.completion = 0
        self.pieces = 0

    @property
    def counts(self) -> tuple[int, int]:
        """Prompt and completion tokens."""
        return self.prompt, self.completion or self.pieces

    def take(self, data: bytes) -> bytes:
        """What of `data` goes to the client now; with `hide`, events go whole."""
        self.pieces += 1
        if not self._rest and data.endswith(b"\n\n") and b'"usage"' not in data:
            self.at_border = True
            return data  # nearly always
        events = self._rest + data
        end = _end_of_last(events)
        whole, rest = events[:end], events[end:]
        if len(rest) > LARGEST_EVENT:
            self._rest = b""
            self.at_border = False
            return events if self._hide else data
        kept = self._read(whole) if b'"usage"' in whole else whole
        # Bytes that were passed on already are kept only to be read.
        self._rest = rest
        if not self._hide:
            self.at_border = not rest
            return data
        self.at_border = self.at_border or bool(kept)
        return kept

    def end(self) -> bytes:
        """What was held back of an event that never ended."""
        rest, self._rest = self._rest, b""
        if rest and self._read(rest) and self._hide:
            return rest
        return b""

    def broken_off(self) -> bytes:
        """What has to go to the client before another event, where the stream ended within one."""
        self.end()
        return b"" if self.at_border else b"\n\n"

    def _read(self, events: bytes) -> bytes:
        """Take note of the usage in `events`; those that are not hidden."""
        separator = b"\r\n\r\n" if b"\r\n\r\n" in events else b"\n\n"
        parts = events.split(separator)
        return separator.join([part for part in parts if not self._is_hidden(part)])

    def _is_hidden(self, event: bytes) -> bool:
        if b'"usage"' not in event:
            return False
        data = b"\n".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:"))
        try:
            answer = _decoder.decode(data)
        except (msgspec.MsgspecError, RecursionError):
            return False
        inner = answer.response or answer.message
        usage = answer.usage or (inner.usage if inner else None)
        if usage is None:
            return False
        prompt, completion = usage.counts
        # Anthropic tells the prompt at the beginning and the completion at the end.
        self.prompt = max(self.prompt, prompt)
        self.completion = max(self.completion, completion)
        return self._hide and answer.choices == []


def _end_of_last(events: bytes) -> int:
    """Where the last whole event ends; 0 when there is none."""
    return max(events.rfind(ending) + len(ending) if ending in events else 0 for ending in (b"\n\n", b"\r\n\r\n"))
