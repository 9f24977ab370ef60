"""Chromium, one for all tests of a module; without it they are skipped, and say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from browser.chromium import ARGUMENTS, CHROMIUM
from made_run import MadeRun, plausible
from spinlm.reporting import html
from spinlm.reporting.comparison import write_comparison


@dataclass
class Visit:
    """A page that is open, and what it has asked for and complained about."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


Open = Callable[..., Visit]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Ended with the module's tests: while playwright is there, nothing else can run an event loop in this thread."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the report isn't tested in a browser")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Open]:
    """Open a page: until it is `ready` (its examples are), `drawn` (its charts are too), or at once.

    In the end, none may have asked for anything or complained.
    """
    opened: list[tuple[Visit, str]] = []

    def visit(place: Path | str, until: str = "ready", clock: bool = False, **context: Any) -> Visit:
        settings = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **context}
        url = place if isinstance(place, str) else place.as_uri()
        seen = Visit(chromium.new_context(**settings).new_page())
        seen.page.set_default_timeout(10_000)
        seen.page.on("console", lambda message: seen.complaints.append(f"{message.type}: {message.text}"))
        seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        if clock:
            seen.page.clock.install()
        seen.page.goto(url)
        if until:
            seen.page.wait_for_selector(f"body[data-{until}]", state="attached")
        opened.append((seen, url))
        return seen

    yield visit
    for seen, url in opened:
        seen.page.context.close()
        assert set(seen.requests) <= {url, "data:,"}
        assert seen.complaints == []


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a whole run."""
    made = plausible(tmp_path_factory.mktemp("whole") / "demo", examples=12, iterations=2, words=6, steps=20)
    return html.write(made.run)


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    """A run whose page says that it is going on."""
    made = plausible(tmp_path_factory.mktemp("running") / "demo", examples=12, iterations=2, words=6, steps=20)
    html.write(made.run, running=True)
    return made


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compared")
    runs = [plausible(place / name, examples=12, words=6, steps=20, seed=seed) for name, seed in (("a", 0), ("b", 1))]
    return write_comparison([made.run for made in runs], place / "comparison.html")
