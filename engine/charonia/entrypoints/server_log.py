"""Reads a Triton server's log: its tail, and the cause of a failed start in one sentence."""

import re
from pathlib import Path

# E1122 18:54:59.464282 22770 model_lifecycle.cc:642] "message with \n for line ends"
_LINE = re.compile(r'^[EF]\d{4} \S+ +\d+ \S+\] +"?(?P<text>.*?)"? *$')
_LOAD_FAILED = re.compile(
    r"failed to load '(?P<model>[^']+)' version \d+: [A-Za-z ]+: (?P<cause>.*)", re.DOTALL
)
_FATAL = re.compile(r"^error: (?P<cause>.*)$")
_HARMLESS = ("CudaDriverHelper has not been initialized", "NVML", "DCGM", "pinned system memory")
_TRACE_START = "\n\nAt:\n"  # pybind11 puts the Python traceback after this


class ServerLog:
    """The part of a log file that one run of the server writes: from its end at construction on.

    What is no regular file, such as a terminal or a pipe, is written to and never read: its text is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = path.stat().st_size if path.is_file() else 0
        self._read = self._start

    def text(self, last_bytes: int = 1 << 20) -> str:
        """What this run has written, at most the last so many bytes; empty where there is no file."""
        if not self.path.is_file():
            return ""
        try:
            with self.path.open("rb") as file:
                end = file.seek(0, 2)
                file.seek(max(self._start, end - last_bytes))
                return file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""

    def new_text(self) -> str:
        """What was written since the last call, whole lines only."""
        if not self.path.is_file():
            return ""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:
            return ""
        data = data[: data.rfind(b"\n") + 1]
        self._read += len(data)
        return data.decode("utf-8", "replace")

    def tail(self, lines: int = 15) -> str:
        """The last lines worth reading: without the tables and blank lines that the server prints."""
        kept = [
            line for line in self.text().splitlines() if line.strip() and not line.startswith(("+--", "|"))
        ]
        return "\n".join(kept[-lines:])

    def cause(self) -> str | None:
        """Why the server failed, a model's own error before any other; None where the log tells nothing."""
        text = self.text()
        errors = [_unescape(match["text"]) for match in map(_LINE.match, text.splitlines()) if match]
        errors = [error for error in errors if not any(word in error for word in _HARMLESS)]
        for error in reversed(errors):
            if failed := _LOAD_FAILED.search(error):
                cause = failed["cause"].partition(_TRACE_START)[0].strip()
                return f"model {failed['model']!r} failed to load: {cause}"
        if errors:
            return errors[-1].partition(_TRACE_START)[0].strip()
        fatal = [match["cause"] for match in map(_FATAL.match, text.splitlines()) if match]
        return fatal[-1] if fatal else None


def _unescape(text: str) -> str:
    """Undo the escaping of the server's logger, which keeps a message on one line."""
    return re.sub(r"\\(.)", lambda match: {"n": "\n", "t": "\t"}.get(match[1], match[1]), text)
