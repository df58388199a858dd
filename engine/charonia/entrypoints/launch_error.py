"""The one error of everything that starts, watches and stops a server."""

from charonia.errors import CharoniaError, ErrorCode


class LaunchError(CharoniaError):
    """A server could not be found, started or kept running.

    Attributes:
        cause: what went wrong, one or several lines.
        mend: what the user can do about it; empty where the cause says it already.
        detail: lines of the server's log, for the reader who wants to see more; may be empty.
    """

    code = ErrorCode.UNAVAILABLE

    def __init__(self, cause: str, mend: str = "", *, detail: str = "") -> None:
        super().__init__(f"{cause}\n{mend}" if mend else cause)
        self.cause = cause
        self.mend = mend
        self.detail = detail
