"""A headless Chromium for pages, and a folder for pictures of them.

The browser is the system's own (Debian's `chromium`), driven by Playwright; without one of the two, tests are skipped.
`EVA_SCREENSHOTS` names the folder where pictures are kept; without it they lie in pytest's."""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A browser, without a way out: no name is resolved."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    # Chromium's sandbox does not work as root; what is opened here are pages of our own.
    arguments = ["--host-resolver-rules=MAP * ~NOTFOUND", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=arguments)
        yield started
        started.close()


@dataclass
class Opened:
    """An open page, and what it has said: errors of the console, addresses it asked for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def measure(self, expression: str) -> Any:
        """What a JavaScript expression comes to."""
        return self.page.evaluate(expression)


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """A function that opens a file at a width, in "light" or "dark"."""
    contexts = []

    def open_page(path: Path, width: int, scheme: str = "light") -> Opened:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        found = Opened(contexts[-1].new_page())
        found.page.on("console", lambda message: found.errors.append(f"{message.type}: {message.text}"))
        found.page.on("pageerror", lambda error: found.errors.append(str(error)))
        found.page.on("request", lambda request: found.requests.append(request.url[:80]))
        found.page.goto(path.resolve().as_uri())
        return found

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures go."""
    named = os.environ.get("EVA_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def picture(request: pytest.FixtureRequest, screenshots: Path) -> Any:
    """A function that keeps a picture of a whole page."""

    def keep(found: Opened, what: str) -> Path:
        name = re.sub(r"\W+", "-", f"{request.node.originalname}-{what}")
        path = screenshots / f"{name}.png"
        found.page.screenshot(path=path, full_page=True)
        return path

    return keep
