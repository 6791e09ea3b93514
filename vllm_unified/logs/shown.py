"""An entry of a log for people: one line, and below it those of a traceback.

What stands in a log may come from strangers, so nothing of it reaches a terminal that is no printed character.
"""

import re
from datetime import datetime

import click

from vllm_unified.logs.files import Entry, Line
from vllm_unified.logs.lines import line as line_of_json

LONGEST = 2000
LINES_BELOW = 200
COLOURS = {"debug": "bright_black", "warning": "yellow", "error": "red", "critical": "bright_red"}
# Control characters, what turns the direction of writing, what ends a line, halves of surrogate pairs. A tab is none.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
BELOW = "    "


def text(entry: Entry, width: int, now: datetime, *, colour: bool) -> str:
    """`width`: of the names. `now`: aware; it says the zone of the times, and which ones are of another day."""
    moment = datetime.fromtimestamp(entry.time, now.tzinfo)
    form = "%H:%M:%S" if moment.date() == now.date() else "%Y-%m-%d %H:%M:%S"
    first, *below = _message(entry).split("\n")
    if len(below) > LINES_BELOW:  # the last lines of a traceback say most
        below = [f"… ({len(below) - LINES_BELOW} lines more, --json has all of them)", *below[-LINES_BELOW:]]
    head = f"{moment:{form}} {entry.name:<{width}} {entry.level.upper():<8} "
    shown = "\n".join(_printable(start + _cut(each)) for start, each in [(head, first), *((BELOW, b) for b in below)])
    return click.style(shown, fg=COLOURS[entry.level]) if colour and entry.level in COLOURS else shown


def json(entry: Entry) -> str:
    """The line as it stands in the file; one that is no JSON becomes the message of one that is."""
    raw = line_of_json(entry.level, entry.name, entry.raw, at=entry.time) if entry.line is None else entry.raw
    return UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", raw)


def _message(entry: Entry) -> str:
    line = entry.line
    if line is None:
        return entry.raw
    if line.duration_us is not None:
        return _request(line, line.duration_us)
    if not line.message:  # in JSON of another kind
        return entry.raw
    message = f"{line.source}: {line.message}" if line.source == "keeper" else line.message
    return f"{message}\n{line.exception}" if line.exception else message


def _request(line: Line, microseconds: int) -> str:
    """A line of the access log: /v1/chat/completions chat 200 1.2 s 30+120 tokens key=app"""
    milliseconds = microseconds / 1000
    words = [
        line.path,
        line.model,
        str(line.status) if line.status else "left",  # before an answer began
        f"{milliseconds / 1000:.1f} s" if milliseconds >= 1000 else f"{milliseconds:.0f} ms",
        f"{line.prompt_tokens}+{line.completion_tokens} tokens" if line.prompt_tokens + line.completion_tokens else "",
        f"key={line.key}" if line.key else "",
        f"error={line.error}" if line.error else "",
    ]
    return " ".join(word for word in words if word)


def _cut(line: str) -> str:
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}… ({len(line):,} characters, --json has all of them)"


def _printable(line: str) -> str:
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), line)
