"""A small server with the chat page and an API that answers by the last message."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from charonia_client.gateway.chat_page import chat_page_routes
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

INJECTION = (
    "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script> **bold** "
    '[link](javascript:alert(1)) `<b>code</b>`\n```html\n<iframe src="/"></iframe>\n```\n'
)
MARKDOWN = (
    "# Sea snails\n\nThree of them, *all* of the family **Charoniidae**:\n\n- *Charonia tritonis*\n"
    "- *Charonia variegata*\n\n1. first\n2. second\n\n> A quote\n\n"
    "```python\ndef blow(trumpet):\n    return trumpet * 2  # a rather long line of code that has to scroll "
    "by itself\n```\n\n"
    "Call `blow(1)` and 2 * 3 * 4 stays."
)


class ScriptedChat:
    """What the page asked for, and whether it went away."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.disconnected = threading.Event()
        self.app = FastAPI()
        self.app.include_router(chat_page_routes())
        self.app.add_api_route("/v1/models", self._models)
        self.app.add_api_route("/v1/chat/completions", self._complete, methods=["POST"])

    async def _models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "small"}, {"id": "large"}]}

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.authorizations.append(request.headers.get("authorization"))
        asked = body["messages"][-1]["content"]
        if asked == "refuse":
            error = {"message": "max_tokens must be at most 8192", "type": "invalid_request_error"}
            return JSONResponse({"error": error}, 400)
        if asked == "busy":
            return JSONResponse({"error": {"message": "The queue is full"}}, 429, {"Retry-After": "7"})
        return StreamingResponse(self._stream(asked), media_type="text/event-stream")

    async def _stream(self, asked: str) -> AsyncIterator[str]:
        yield _event({"role": "assistant", "content": ""})
        if asked == "endless":
            try:
                for number in range(10_000):
                    yield _event({"content": f"{number} "})
                    await asyncio.sleep(0.02)
            finally:
                self.disconnected.set()
        if asked == "think":
            for word in ("I ", "weigh ", "it."):
                yield _event({"reasoning_content": word})
        text = {"inject": INJECTION, "markdown": MARKDOWN}.get(asked, f"You said: {asked}")
        for start in range(0, len(text), 7):
            yield _event({"content": text[start : start + 7]})
            await asyncio.sleep(0.5 if asked == "slow" and start == 0 else 0.002)
        if asked == "break":
            yield 'data: {"error": {"message": "The engine died"}}\n\n'
            return
        if asked == "vanish":
            return
        yield _event({}, finish_reason="stop")
        usage = {"prompt_tokens": 5, "completion_tokens": 21, "total_tokens": 26}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"


def _event(delta: dict[str, Any], finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice]})}\n\n"


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serve ``app`` on a free port of the loopback from a thread; yield its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
