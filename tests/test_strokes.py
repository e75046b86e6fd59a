"""Measurements of strokes drawn with known widths, angles and holes."""

import math

import pytest
import torch
from torch.testing import assert_close

from capsnb.strokes import MEASUREMENTS, area, height, holes, slant, stroke_width, width

ROW, COLUMN = torch.meshgrid(torch.arange(28.0).double(), torch.arange(28.0).double(), indexing="ij")


def image(ink):
    return ink.double().clamp(0, 1)[None, None]


def bar(thickness, *, angle=0.0, length=23.0):
    """A stroke through the middle, ``angle`` degrees from upright to the right, its edge spread over one pixel."""
    turn = math.radians(angle)
    x, y = COLUMN - 13.5, 13.5 - ROW
    across, along = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
    inside = torch.minimum(thickness / 2 - across.abs(), length / 2 - along.abs())
    return image(inside + 0.5)


def sheared(angle, thickness=3.0):
    """A stroke whose rows are shifted: the shear of upright writing by ``angle`` degrees."""
    return image(thickness / 2 - (COLUMN - 13.5 - (13.5 - ROW) * math.tan(math.radians(angle))).abs() + 0.5)


def ring(row, column, radius, thickness=2.0):
    return image(thickness / 2 - ((ROW - row) ** 2 + (COLUMN - column) ** 2).sqrt().sub(radius).abs() + 0.5)


def test_the_area_is_the_sum_of_the_ink():
    pictures = torch.cat([image(torch.full((28, 28), 0.25)), image(torch.eye(28))])
    assert_close(area(pictures), torch.tensor([196.0, 28.0]).double())


@pytest.mark.parametrize("angle", [0, 17, 45, -71])
@pytest.mark.parametrize("thickness", [2.0, 3.0, 4.5])
def test_the_width_of_a_straight_stroke_is_found_at_any_angle_but_for_its_ends(thickness, angle):
    roof = thickness * (1 - thickness / (3 * 23))  # four times the mean height of a hip roof that rises as it goes in
    assert stroke_width(bar(thickness, angle=angle)).item() == pytest.approx(roof, abs=0.2)


def test_a_rim_of_the_image_is_an_edge_of_the_stroke():
    assert stroke_width(image(COLUMN < 5)).item() == pytest.approx(5, abs=0.6)


def test_of_a_disc_two_thirds_of_the_diameter_count_as_width():
    disc = image(9.5 - ((ROW - 13.5) ** 2 + (COLUMN - 13.5) ** 2).sqrt())
    assert stroke_width(disc).item() == pytest.approx(2 / 3 * 18, abs=0.4)


@pytest.mark.parametrize("angle", [-31, -7, 0, 13, 29])
def test_the_slant_is_the_angle_of_the_shear_and_positive_to_the_right(angle):
    assert slant(sheared(angle)).item() == pytest.approx(angle, abs=0.3)


def test_the_slant_does_not_depend_on_brightness_or_place():
    picture = sheared(13)
    moved = torch.roll(0.25 * picture, 3, dims=3)
    assert slant(moved).item() == pytest.approx(slant(picture).item())


@pytest.mark.parametrize("tall, wide", [(7, 13), (23, 1)])
def test_height_and_width_of_a_filled_box_are_its_sides(tall, wide):
    box = image((ROW >= 3) & (ROW < 3 + tall) & (COLUMN >= 5) & (COLUMN < 5 + wide))
    assert height(box).item() == pytest.approx(tall) and width(box).item() == pytest.approx(wide)


def test_holes_are_counted_and_a_gap_opens_one():
    eight = (ring(8, 13, 5) + ring(18, 13, 5)).clamp(max=1)
    cut = ring(13, 13, 7)
    cut[..., 12:15, 13:] = 0
    assert holes(torch.cat([bar(3.0), ring(13, 13, 7), eight, cut])).tolist() == [0, 1, 2, 0]


def test_a_diagonal_line_of_single_pixels_closes_a_hole():
    diamond = image((ROW - 13).abs() + (COLUMN - 13).abs() == 7)
    assert holes(diamond).item() == 1


def test_a_stroke_from_rim_to_rim_closes_in_nothing():
    assert holes(image((ROW - 13).abs() < 2)).item() == 0


def test_images_without_ink_measure_nothing_and_pixels_of_others_do_not_matter():
    both = torch.cat([image(torch.zeros(28, 28)), sheared(13)])
    for measure in MEASUREMENTS.values():
        assert measure(both)[0] == 0
        assert_close(measure(both)[1:], measure(both[1:]))


def test_real_digits_have_strokes_of_a_few_pixels_a_0_has_a_hole_and_a_1_has_none(digits):
    images, labels = digits
    found = stroke_width(images)
    assert 1 < found.median() < 4 and found.min() > 0.5
    assert holes(images[labels == 0]).median() == 1 and holes(images[labels == 1]).median() == 0
    assert width(images[labels == 0]).median() > width(images[labels == 1]).median()


@pytest.mark.parametrize("measure", MEASUREMENTS.values())
def test_what_is_no_image_in_0_to_1_is_refused(measure):
    with pytest.raises(ValueError, match="images"):
        measure(torch.full((2, 1, 28, 28), 255.0))
