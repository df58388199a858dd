"""Serves the chat page at ``/`` and its files under ``/chat/``."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter, Request, Response

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class _StaticFile:
    body: bytes
    headers: dict[str, str]


def _read_files() -> dict[str, _StaticFile]:
    """Return every file of the page by its name."""
    found: dict[str, _StaticFile] = {}
    for entry in files(__package__).joinpath("static").iterdir():
        media_type = _MEDIA_TYPES.get("." + entry.name.rpartition(".")[2])
        if media_type is None:
            continue
        body = entry.read_bytes()
        found[entry.name] = _StaticFile(
            body,
            {
                "Content-Type": media_type,
                "ETag": f'"{hashlib.blake2b(body, digest_size=16).hexdigest()}"',
                "Cache-Control": "no-cache",  # kept, but asked about: a new version shows at once
                "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cross-Origin-Opener-Policy": "same-origin",
            },
        )
    return found


def _add_route(router: APIRouter, path: str, file: _StaticFile) -> None:
    unchanged = {name: value for name, value in file.headers.items() if name != "Content-Type"}

    async def respond(request: Request) -> Response:
        if request.headers.get("if-none-match") == file.headers["ETag"]:
            return Response(status_code=304, headers=unchanged)
        return Response(file.body, headers=file.headers)

    router.add_api_route(path, respond, methods=["GET", "HEAD"], include_in_schema=False)


def chat_page_routes() -> APIRouter:
    """Return the routes of the page, one a file, which stay out of the OpenAPI document.

    The page calls ``v1/models`` and ``v1/chat/completions`` relative to where it is.
    """
    router = APIRouter()
    for name, file in _read_files().items():
        _add_route(router, "/" if name == "index.html" else f"/chat/{name}", file)
    return router
