"""API keys: every route is closed but the few that are named."""

import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from charonia_client.gateway.errors import ApiError

HEALTH_PATH = "/health"


class ApiKeyAuth:
    """ASGI middleware that lets requests pass which bring one of the keys as a bearer token.

    open_paths: paths that need no key, for GET and HEAD; one that ends in "*" stands for all that begin so.
    """

    def __init__(self, app: ASGIApp, *, keys: Iterable[str], open_paths: Iterable[str]) -> None:
        self._app = app
        # Digests are of one length, so that comparing them tells nothing about the keys.
        self._digests = [_digest(key.encode()) for key in keys]
        self._open_paths = frozenset(open_paths)
        self._open_starts = tuple(path[:-1] for path in self._open_paths if path.endswith("*"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan" or self._is_open(scope) or self._is_authorized(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError("only HTTP is served")
        error = ApiError(
            "this server needs an API key: send it as 'Authorization: Bearer KEY'",
            status=401,
            code="invalid_api_key",
        )
        await error.response({"www-authenticate": "Bearer"})(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            return False
        path: str = scope["path"]
        return path in self._open_paths or bool(self._open_starts and path.startswith(self._open_starts))

    def _is_authorized(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = (given[0] if len(given) == 1 else b"").partition(b" ")
        digest = _digest(token.strip())
        # Every key is compared, whichever fits.
        matches = [hmac.compare_digest(digest, key) for key in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
