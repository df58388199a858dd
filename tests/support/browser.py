"""Finds a Chromium to drive: one on PATH, or the one that ``make browser`` put into the user's cache."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser(playwrights_own: str) -> str | None:
    """Return the path of a browser that exists."""
    for name in NAMES:
        found = shutil.which(name)
        if found:
            return found
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    fetched = sorted(cache.glob("charonia/browser/*/chromium.sh"))
    if fetched:
        return str(fetched[-1])
    return playwrights_own if Path(playwrights_own).exists() else None


@contextmanager
def launched_browser() -> Iterator[Browser]:
    """Run a headless browser; skip the test where there is none."""
    with sync_playwright() as playwright:
        path = find_browser(playwright.chromium.executable_path)
        if path is None:
            pytest.skip("no Chromium found: install one, or run `make browser`")
        browser = playwright.chromium.launch(
            executable_path=path, args=["--headless", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            browser.close()
