"""Views: nearest images, small deformations, groups."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from capsnb.settings import ViewsSettings
from capsnb.views import Views, deform, neighbours

STILL = ViewsSettings(count=5, learned=2, neighbours=3, shift=0.0, rotation=0.0, shear=0.0, scale=0.0)


def test_neighbours_are_those_at_the_smallest_angle_itself_first(rng):
    images = torch.rand(61, 1, 28, 28, generator=rng)
    halved = images.numpy().reshape(61, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(61, -1)
    halved /= np.linalg.norm(halved, axis=1, keepdims=True)
    for row, found in enumerate(neighbours(images, 7).tolist()):
        order = np.argsort(-halved @ halved[row], kind="stable").tolist()
        assert found == [row] + [other for other in order if other != row][:7]


def test_equal_images_each_come_first_among_their_own_neighbours(rng):
    images = torch.rand(3, 1, 28, 28, generator=rng).repeat(5, 1, 1, 1)
    assert neighbours(images, 2)[:, 0].tolist() == list(range(15))


def test_few_images_have_few_neighbours(rng):
    assert neighbours(torch.rand(3, 1, 28, 28, generator=rng), 7).shape == (3, 3)


def test_without_room_to_move_an_image_stays_as_it_is(rng):
    images = torch.rand(11, 1, 28, 28, generator=rng)
    assert_close(deform(images, STILL, rng=rng), images, rtol=0, atol=1e-4)


@pytest.fixture
def dot():
    """A grey disc around row 9, column 17, counted from 0."""
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    return torch.exp(-((rows - 9) ** 2 + (columns - 17) ** 2) / 8)[None, None]


def centre(images):
    """The centre of mass of each image, in pixels from the middle of the picture: down, right."""
    axis = torch.arange(28.0) - 13.5
    mass = images.sum((1, 2, 3))
    return torch.stack([(images.sum((1, 3)) * axis).sum(1) / mass, (images.sum((1, 2)) * axis).sum(1) / mass], dim=1)


def test_images_are_moved_evenly_by_no_more_than_the_limit(dot, rng):
    moved = centre(deform(dot.expand(2003, -1, -1, -1), replace(STILL, shift=3.0), rng=rng)) - centre(dot)
    assert moved.abs().max() < 3.01
    assert_close(moved.std(0), torch.full((2,), 3 / math.sqrt(3)), rtol=0.05, atol=0)
    assert_close(moved.mean(0), torch.zeros(2), rtol=0, atol=0.15)


def test_images_are_turned_by_no_more_than_the_limit_and_keep_their_distance_from_the_middle(dot, rng):
    place = centre(deform(dot.expand(2003, -1, -1, -1), replace(STILL, rotation=20.0), rng=rng))
    distance, expected = (torch.linalg.vector_norm(each, dim=1) for each in (place, centre(dot)))
    assert_close(distance, expected.expand(2003), rtol=0.02, atol=0)
    turned = torch.rad2deg(torch.atan2(place[:, 0], place[:, 1])) - torch.rad2deg(torch.atan2(*centre(dot)[0]))
    assert turned.abs().max() < 20.5 and turned.abs().max() > 19
    assert_close(turned.std().item(), 20 / math.sqrt(3), rtol=0.05, atol=0)


def test_images_are_stretched_along_each_axis_by_its_own_share(dot, rng):
    place = centre(deform(dot.expand(2003, -1, -1, -1), replace(STILL, scale=0.2), rng=rng)) / centre(dot)
    assert place.min() > 1 / 1.21 and place.max() < 1 / 0.79
    assert abs(np.corrcoef(place.T.numpy())[0, 1]) < 0.1


def test_a_shear_moves_columns_by_their_row(dot, rng):
    moved = centre(deform(dot.expand(2003, -1, -1, -1), replace(STILL, shear=0.3), rng=rng)) - centre(dot)
    assert moved[:, 0].abs().max() < 0.05
    assert 1.2 < moved[:, 1].abs().max() < 0.31 * 4.5


def test_every_image_is_deformed_on_its_own_and_the_same_for_the_same_seed(dot):
    images = dot.expand(7, -1, -1, -1)
    first, again, other = (
        deform(images, ViewsSettings(), rng=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({image.sum().item() for image in first}) == 7


def test_a_group_shows_the_image_itself_then_itself_or_its_neighbours(rng):
    images = torch.rand(31, 1, 28, 28, generator=rng)
    views = Views(images, lambda shown: shown.flatten(2).mT, replace(STILL, count=40))
    near = neighbours(images, 3)
    rows = torch.tensor([4, 29, 11])
    torch.manual_seed(0)
    groups = views[rows].mT.unflatten(0, (3, 40)).flatten(2)
    assert len(views) == 31
    for row, group in zip(rows, groups):
        distance = torch.cdist(group, images.flatten(1))
        shown = distance.argmin(1)
        assert distance.amin(1).max() < 1e-2
        assert shown[0] == row and set(shown.tolist()) == set(near[row].tolist())


def test_what_a_group_shows_follows_from_torchs_seed(rng):
    images = torch.rand(31, 1, 28, 28, generator=rng)
    views = Views(images, lambda shown: shown.flatten(2).mT, ViewsSettings())
    rows, found = torch.arange(3), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(views[rows])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
