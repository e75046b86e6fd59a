"""The website as `make book` built it, and what the tests of its pages do again and again."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect

ROOT = Path(__file__).parents[2]
HTML = ROOT / "_build" / "html"
PATIENCE = 60_000  # milliseconds that a busy machine may take for anything
WIDGETS = {
    "01-start-here": ["explorer"],
    "11-move-a-capsule": ["explorer", "walk", "tour"],
    "13-routing-watched": ["routing"],
    "14-draw-a-digit": ["draw"],
    "24-sparse-unsupervised-capsules": ["explorer"],
    "26-side-by-side": ["explorer"],
}


def is_built() -> bool:
    """Whether the website stands there, with the widgets of this tree."""
    modules = (ROOT / "capsnb" / "web").glob("*.js")
    built = HTML / "_static" / "web"
    return all(
        (built / path.name).exists() and (built / path.name).read_bytes() == path.read_bytes() for path in modules
    )


def without(folder: Path, *missing: str) -> Path:
    """A copy of the website that lacks some files."""
    shutil.copytree(HTML, folder, ignore=shutil.ignore_patterns(*missing, "mathjax", "_sources"))
    return folder


def widget(page: Page, kind: str) -> Locator:
    """The widget, once its model is there."""
    page.wait_for_selector(f'.capsnb[data-widget="{kind}"][data-ready]', timeout=PATIENCE)
    return page.locator(f'.capsnb[data-widget="{kind}"] .capsnb-widget')


def pixels(canvas: Locator) -> np.ndarray:
    """The greys of a picture, [28, 28] in [0, 1]."""
    script = (
        "(canvas) => Array.from(canvas.getContext('2d').getImageData(0, 0, 28, 28).data.filter((_, n) => n % 4 === 0))"
    )
    return np.array(canvas.evaluate(script)).reshape(28, 28) / 255


def eventually(page: Page, read: Callable[[], object], wanted: object = True) -> None:
    """Wait until what ``read`` returns is what is wanted; the page goes on meanwhile."""
    end = time.monotonic() + PATIENCE / 1000
    while (found := read()) != wanted and time.monotonic() < end:
        page.wait_for_timeout(50)
    assert found == wanted, f"after {PATIENCE / 1000:.0f} s: {found}, not {wanted}"


def expect_picture(canvas: Locator, image: np.ndarray, near: float) -> None:
    """Wait until every pixel is that of the image [28, 28], up to ``near``."""
    eventually(canvas.page, lambda: np.abs(pixels(canvas) - image).max(), pytest.approx(0, abs=near))


def pick(group: Locator, value: object) -> None:
    """Choose one of several options by its label, as the mouse does."""
    group.locator(f"label:has(input[value='{value}'])").click()
    expect(group.locator(f"input[value='{value}']")).to_be_checked()


def come_to_rest(page: Page) -> None:
    """Wait until nothing more is fetched and every formula is set."""
    page.wait_for_load_state("networkidle")
    page.evaluate("globalThis.MathJax?.startup?.promise")
