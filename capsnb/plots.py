"""Figures of the book: image grids and curves, opaque and colour-blind safe."""

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito


def style() -> None:
    """Set matplotlib's defaults for the book: white opaque figures, readable sizes, Okabe and Ito's colours."""
    plt.rcParams.update(
        {
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "figure.dpi": 110,
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": plt.cycler(color=COLOURS),
            "image.cmap": "gray",
        }
    )


def tile(images: Float[Tensor, "rows columns 1 height width"], gap: int = 2) -> np.ndarray:
    """One picture of a grid of images, with mid-grey gaps of ``gap`` pixels."""
    rows, columns, _, height, width = images.shape
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap), 0.35)
    for row in range(rows):
        for column in range(columns):
            top, left = gap + row * (height + gap), gap + column * (width + gap)
            canvas[top : top + height, left : left + width] = images[row, column, 0].numpy()
    return canvas


def show_grid(
    images: Float[Tensor, "rows columns 1 height width"],
    *,
    title: str = "",
    row_labels: list[str] | None = None,
    column_labels: list[str] | None = None,
    width: float = 10.0,
) -> Figure:
    """A grid of images in [0, 1], gray from 0 (black) to 1 (white), on one axis; returns the figure."""
    canvas = tile(images)
    figure, axis = plt.subplots(figsize=(width, width * canvas.shape[0] / canvas.shape[1] + 0.5), layout="constrained")
    axis.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[], title=title)
    axis.spines[:].set_visible(False)
    rows, columns = images.shape[:2]
    if row_labels:
        axis.set_yticks((np.arange(rows) + 0.5) * canvas.shape[0] / rows, row_labels)
    if column_labels:
        axis.set_xticks((np.arange(columns) + 0.5) * canvas.shape[1] / columns, column_labels)
    axis.tick_params(length=0, labelsize=9)
    return figure


def show_curves(curves: dict[str, tuple[list, list]], *, xlabel: str, ylabel: str, log: bool = False) -> Figure:
    """One line a named curve, with axis labels (give units there); returns the figure."""
    figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    for name, (x, y) in curves.items():
        axis.plot(x, y, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    if len(curves) > 1:
        axis.legend(frameon=False)
    return figure
