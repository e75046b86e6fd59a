"""The still picture of every widget: for a page without JavaScript, for paper, for a notebook without its kernel.

Each function gives rows of images, [height, width] or [height, width, RGB] of bytes and how often to repeat a pixel.
"""

import io

import numpy as np
from PIL import Image

from capsnb.live import ROUNDS, Shown

Row = list[tuple[np.ndarray, int]]
SIDE, GAP = 28, 8
LESS, EVEN, MORE = (np.array(colour) for colour in ((179, 88, 6), (247, 247, 247), (84, 39, 136)))  # ColorBrewer's PuOr


def explorer(state: dict, shown: Shown, digits: dict[int, dict]) -> list[Row]:
    """The picture, the real image where the pose began, the strip."""
    real = [] if state["image"] is None else [(_image(digits[state["image"]]), 5)]
    return [[(_greys(shown["picture"])[0], 10), *real], _strip(shown)]


def tour(state: dict, shown: Shown, digits: dict[int, dict]) -> list[Row]:
    """The picture, the strip."""
    return [[(_greys(shown["picture"])[0], 10)], _strip(shown)]


def walk(state: dict, shown: Shown, digits: dict[int, dict]) -> list[Row]:
    """The two ends with the picture between them, the strip."""
    first, last = (_image(digits[state[end]]) for end in ("from", "to"))
    return [[(first, 5), (_greys(shown["picture"])[0], 10), (last, 5)], _strip(shown)]


def routing(state: dict, shown: Shown, digits: dict[int, dict]) -> list[Row]:
    """The image, and the map of the couplings to every capsule."""
    maps = np.frombuffer(shown["maps"], np.float32).reshape(ROUNDS, -1, 6, 6)[state["rounds"] - 1]
    share = np.abs(maps - 1).clip(max=1)[..., None]
    colours = (EVEN + share * (np.where(maps[..., None] < 1, LESS, MORE) - EVEN)).round().astype(np.uint8)
    rows = [[(each, 8) for each in colours[first : first + 10]] for first in range(0, len(colours), 10)]
    return [[(_image(digits[state["image"]]), 8)], *rows]


def draw(state: dict, shown: Shown, digits: dict[int, dict]) -> list[Row]:
    """The drawing, and what the model sends back of it."""
    ends = [] if state["image"] is None else [(_image(digits[state["image"]]), 10)]
    return [[*ends, (_greys(shown["picture"])[0], 10)]]


def png(rows: list[Row]) -> bytes:
    """Rows of images on white, one below the other, as a PNG."""
    lines = [[_enlarge(*image) for image in row] for row in rows]
    width = max(sum(image.shape[1] for image in line) + GAP * (len(line) - 1) for line in lines)
    height = sum(max(image.shape[0] for image in line) for line in lines) + GAP * (len(lines) - 1)
    canvas, top, file = np.full((height, width, 3), 255, np.uint8), 0, io.BytesIO()
    for line in lines:
        left = 0
        for image in line:
            canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
            left += image.shape[1] + GAP
        top += max(image.shape[0] for image in line) + GAP
    Image.fromarray(canvas).save(file, "png", optimize=True)
    return file.getvalue()


def _enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    colour = image if image.ndim == 3 else np.stack([image] * 3, axis=2)
    return colour.repeat(scale, axis=0).repeat(scale, axis=1)


def _greys(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8).reshape(-1, SIDE, SIDE)


def _image(digit: dict) -> np.ndarray:
    return np.array(digit["image"], np.uint8).reshape(SIDE, SIDE)


def _strip(shown: Shown) -> Row:
    return [(image, 2) for image in _greys(shown["strip"])]
