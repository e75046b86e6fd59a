"""The figures of the book."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from capsnb import plots


@pytest.fixture(autouse=True)
def default_style():
    """Every test begins and ends with matplotlib's own defaults and no open figure."""
    with plt.rc_context():
        plt.rcdefaults()
        yield
    plt.close("all")


def test_images_are_tiled_row_by_row_with_grey_gaps(rng):
    images = torch.rand(2, 3, 1, 5, 7, generator=rng)
    canvas = plots.tile(images, gap=2)
    assert canvas.shape == (2 * 5 + 3 * 2, 3 * 7 + 4 * 2)
    expected = np.full(canvas.shape, 0.35)
    for row in range(2):
        for column in range(3):
            for y in range(5):
                for x in range(7):
                    expected[2 + 7 * row + y, 2 + 9 * column + x] = images[row, column, 0, y, x]
    np.testing.assert_array_equal(canvas, expected)


def test_a_grid_shows_black_for_0_and_white_for_1_whatever_its_range(rng):
    images = 0.4 + 0.1 * torch.rand(2, 3, 1, 28, 28, generator=rng)
    (axis,) = plots.show_grid(images, title="Fig. 2", row_labels=["a", "b"], column_labels=["0", "1", "2"]).axes
    (picture,) = axis.images
    np.testing.assert_array_equal(picture.get_array(), plots.tile(images))
    assert picture.get_clim() == (0, 1) and picture.get_cmap().name == "gray"
    assert axis.get_title() == "Fig. 2"


def test_the_labels_of_a_grid_stand_at_the_middle_of_their_rows_and_columns(rng):
    images = torch.rand(2, 3, 1, 28, 28, generator=rng)
    (axis,) = plots.show_grid(images, row_labels=["a", "b"], column_labels=["0", "1", "2"]).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "1", "2"]
    for ticks, count in ((axis.get_yticks(), 2), (axis.get_xticks(), 3)):
        for place, tick in enumerate(ticks):
            assert 2 + 30 * place < tick < 30 + 30 * place
        assert len(ticks) == count


def test_a_grid_without_labels_has_no_ticks():
    (axis,) = plots.show_grid(torch.zeros(2, 3, 1, 28, 28)).axes
    assert len(axis.get_xticks()) == len(axis.get_yticks()) == 0


def test_curves_have_their_names_values_and_axis_labels():
    curves = {"train": ([1, 2, 3], [0.5, 0.4, 0.3]), "test": ([1, 3], [0.6, 0.5])}
    (axis,) = plots.show_curves(curves, xlabel="updates", ylabel="loss (nats)", log=True).axes
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_yscale()) == ("updates", "loss (nats)", "log")
    for line, (name, (x, y)) in zip(axis.lines, curves.items(), strict=True):
        assert line.get_label() == name
        assert line.get_xdata().tolist() == x and line.get_ydata().tolist() == y
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["train", "test"]


def test_a_single_curve_needs_no_legend_and_is_linear():
    (axis,) = plots.show_curves({"loss": ([1, 2], [3, 4])}, xlabel="updates", ylabel="loss").axes
    assert axis.get_legend() is None and axis.get_yscale() == "linear"


def test_figures_of_the_book_are_opaque_white_on_any_page(tmp_path):
    plt.rcParams.update({"figure.facecolor": "none", "savefig.facecolor": "none"})
    plots.style()
    figure = plots.show_curves({"loss": ([1, 2], [3, 4])}, xlabel="updates", ylabel="loss")
    figure.savefig(tmp_path / "figure.png")
    assert (plt.imread(tmp_path / "figure.png")[0, 0] == 1).all()


def test_the_colours_are_those_of_okabe_and_ito_and_lines_take_them_in_turn():
    plots.style()
    published = {"#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000"}
    assert set(plots.COLOURS) <= published and len(set(plots.COLOURS)) == len(plots.COLOURS)
    curves = {str(number): ([1, 2], [number, number]) for number in range(6)}
    (axis,) = plots.show_curves(curves, xlabel="updates", ylabel="loss").axes
    assert tuple(line.get_color() for line in axis.lines) == plots.COLOURS
