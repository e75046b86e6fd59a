"""The website as `make book` built it, and what the tests of its pages do again and again."""

import shutil
from pathlib import Path

import numpy as np
from playwright.sync_api import Locator, Page

ROOT = Path(__file__).parents[2]
HTML = ROOT / "_build" / "html"
WIDGETS = {
    "01-start-here": ["explorer"],
    "11-move-a-capsule": ["explorer", "walk", "tour"],
    "13-routing-watched": ["routing"],
    "14-draw-a-digit": ["draw"],
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
    page.wait_for_selector(f'.capsnb[data-widget="{kind}"][data-ready]', timeout=60_000)
    return page.locator(f'.capsnb[data-widget="{kind}"] .capsnb-widget')


def pixels(canvas: Locator) -> np.ndarray:
    """The greys of a picture, [28, 28] in [0, 1]."""
    script = (
        "(canvas) => Array.from(canvas.getContext('2d').getImageData(0, 0, 28, 28).data.filter((_, n) => n % 4 === 0))"
    )
    return np.array(canvas.evaluate(script)).reshape(28, 28) / 255


def settle(page: Page) -> None:
    """Wait until what was asked for is computed and drawn."""
    page.wait_for_timeout(400)
