"""How the files of the chat page are served."""

from collections.abc import Iterator
from pathlib import Path

import charonia_client.gateway.chat_page
import pytest
from charonia_client.gateway.chat_page import chat_page_routes
from fastapi import FastAPI
from fastapi.testclient import TestClient

STATIC = Path(charonia_client.gateway.chat_page.__file__).with_name("static")


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI()
    app.include_router(chat_page_routes())
    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize("file", sorted(STATIC.iterdir()), ids=lambda file: file.name)
def test_every_file_is_served_with_safe_headers(client: TestClient, file: Path) -> None:
    path = "/" if file.name == "index.html" else f"/chat/{file.name}"
    response = client.get(path)
    assert response.content == file.read_bytes()
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    assert response.headers["content-type"].split(";")[0] == types[file.suffix]
    unchanged = client.get(path, headers={"If-None-Match": response.headers["etag"]})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    head = client.head(path)
    assert (head.content, head.headers["content-length"]) == (b"", str(file.stat().st_size))


@pytest.mark.parametrize(
    "path", ["/chat/", "/chat/routes.py", "/chat/../routes.py", "/chat/%2e%2e/routes.py"]
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for file in STATIC.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in text.replace("// ", ""), file
        for unsafe in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "Function(",
        ):
            assert unsafe not in text, file


def test_the_page_is_not_in_the_api_document(client: TestClient) -> None:
    assert client.get("/openapi.json").json()["paths"] == {}
