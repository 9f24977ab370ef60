"""`make screenshots`: the report of a run as the README shows it.

python -m browser.screenshots RUN FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from browser.chromium import ARGUMENTS, CHROMIUM
from spinlm.errors import UserError
from spinlm.reporting import html
from spinlm.rundir import RunDir


@dataclass(frozen=True)
class Shot:
    """A picture.

    Attributes:
        name: Of its file.
        width: Of the window, in pixels.
        height: The same.
        scheme: `light` or `dark`.
        at: What to scroll to.
    """

    name: str
    width: int
    height: int
    scheme: str = "light"
    at: str = ""


SHOTS = (
    Shot("report-1280", 1280, 900),
    Shot("report-1280-dark", 1280, 900, "dark", at="#curves"),
    Shot("report-820", 820, 1000, at="#training"),
    Shot("report-390", 390, 844),
    Shot("examples-1280", 1280, 760, at="#examples"),
)


def take(browser: Any, page: Path, folder: Path) -> list[Path]:
    """Write the pictures of a page."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_take(browser, page, folder / f"{shot.name}.png", shot) for shot in SHOTS]


def _take(browser: Any, page: Path, out: Path, shot: Shot) -> Path:
    window = {"width": shot.width, "height": shot.height}
    context = browser.new_context(viewport=window, color_scheme=shot.scheme, reduced_motion="reduce")
    tab = context.new_page()
    tab.goto(page.resolve().as_uri())
    tab.wait_for_selector("body[data-drawn]", state="attached")
    if shot.at:
        tab.evaluate("(at) => document.querySelector(at).scrollIntoView()", shot.at)
    tab.screenshot(path=out)
    context.close()
    return out


def main() -> None:
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        raise SystemExit("screenshots need Chromium: make browser installs it")
    run, folder = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        page = html.write(RunDir(run))
    except UserError as error:
        raise SystemExit(f"{error}; make demo makes one, or give RUN=...") from None
    with sync_playwright() as driver:
        for path in take(driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS), page, folder):
            print(path)


if __name__ == "__main__":
    main()
