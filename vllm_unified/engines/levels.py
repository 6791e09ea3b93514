"""How grave a line is that an engine wrote, by what vLLM and the libraries below it put before it."""

import re

# (EngineCore pid=17) INFO 11-22 15:00:00 [core.py:12] …, and of its server: (APIServer pid=11) INFO:     127.0.0.1 …
HEAD = re.compile(
    r"(?P<process>\([^()]*pid=\d+\) )?"
    r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL)(?::\s+| \d\d-\d\d \d\d:\d\d:\d\d )(?P<text>.*)"
)
PROCESS = re.compile(r"(?:\([^()]*pid=\d+\) )?(?:\[rank\d+\]: ?)?")
TRACEBACK = "Traceback (most recent call last):"
BETWEEN = ("The above exception was ", "During handling of the above exception, ")
# A cause stands at the beginning of a line, behind vLLM's own prefix; the deepest one is written last.
ERROR = re.compile(r"(?:[\w.]*(?:Error|Exception|Interrupt): |[\w.]+: error: |Value error, ).*")
WARNING = re.compile(r"\S+:\d+: \w*Warning: ")
# [W1122 15:00:00.595889254 utils.cpp:68] Warning: …, of libraries in C++
GLOG = re.compile(r"(?:\[rank\d+\]:)?\[([IWEF])\d{4} \d\d:")
GLOG_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "critical"}


class Levels:
    """Of the lines of one engine, in their order: what belongs to a traceback has no level of its own."""

    def __init__(self) -> None:
        self._in_traceback: dict[str, bool] = {}  # by process; False: its last line, which names the error, was there

    def of(self, line: str) -> tuple[str, str]:
        """The level, and the line without the level and the time, which a line of JSON has itself."""
        if head := HEAD.match(line):
            process = head["process"] or ""
            self._in_traceback.pop(process, None)
            return head["level"].lower(), process + head["text"]
        return self._of_bare(line), line

    def _of_bare(self, line: str) -> str:
        found = PROCESS.match(line)
        process = found[0] if found else ""
        text = line[len(process) :]
        if text.lstrip(" |+").endswith(TRACEBACK):
            self._in_traceback[process] = True
            return "error"
        if process in self._in_traceback:
            if not text or text[0] in " \t|+" or text.startswith(BETWEEN):
                return "error"
            if self._in_traceback[process]:
                self._in_traceback[process] = False
                return "error"
            del self._in_traceback[process]
        if ERROR.match(text):
            return "error"
        if WARNING.match(text):
            return "warning"
        glog = GLOG.match(text) or GLOG.match(line)
        return GLOG_LEVELS[glog[1]] if glog else "info"
