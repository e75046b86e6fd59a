"""Windows of a frame: one pass gives what every window alone would give, and the one that is answered most is found."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from capsnb.windows import (
    answers,
    best_window,
    centre_of_mass,
    centred_window,
    crop,
    lower_map,
    window_capsules,
)


@pytest.fixture
def frames(digits):
    """Three digits in frames of 44 x 38 pixels: 9 windows one below the other and 6 side by side."""
    return F.pad(digits[0][:3], [4, 6, 11, 5])


def places(count, row, column):
    return torch.tensor([[row, column]]).expand(count, 2)


def test_one_pass_gives_the_lower_capsules_of_every_window(small_model, frames):
    x = lower_map(small_model, frames)
    assert x.shape == (3, 6, 14, 11)
    for row in range(9):
        for column in range(6):
            alone = small_model.lower_capsules(crop(frames, places(3, 2 * row, 2 * column)))
            window = x[:, :, row : row + 6, column : column + 6]  # channels hold 2 capsules of 3 at each position
            assert_close(window.permute(0, 2, 3, 1).reshape(3, 72, 3), alone, atol=1e-5, rtol=0)


def test_one_convolution_gives_the_upper_capsules_of_every_window_each_as_if_it_alone_were_on(small_model, frames):
    W = small_model.encoder.W.detach()
    z = window_capsules(lower_map(small_model, frames), W)
    assert z.shape == (3, 5, 7, 9, 6)
    for row, column in ((0, 0), (8, 5), (3, 4), (7, 1)):
        x = small_model.lower_capsules(crop(frames, places(3, 2 * row, 2 * column)))
        assert_close(z[..., row, column], torch.einsum("ijde,bie->bjd", W, x), atol=1e-5, rtol=1e-4)


def test_the_answer_of_a_window_is_the_length_of_its_longest_capsule(double):
    z = double(3, 5, 7, 2, 11)
    found = answers(z)
    for b, row, column in ((0, 1, 10), (2, 0, 3), (1, 1, 0)):
        assert_close(found[b, row, column], max(capsule.norm() for capsule in z[b, :, :, row, column]))


def test_the_best_window_is_the_first_of_those_answered_most_at_its_place_in_pixels():
    answered = torch.zeros(3, 5, 7)
    answered[0, 4, 2], answered[1, 1, 6], answered[1, 3, 0] = 0.5, 0.7, 0.7
    assert best_window(answered).tolist() == [[8, 4], [2, 12], [0, 0]]


def test_a_digit_at_an_even_place_gives_the_capsules_of_the_digit_when_its_window_is_answered_most(small_model, digits):
    digit = digits[0][:1]
    with torch.no_grad():  # a capsule that asks for this digit and nothing else
        small_model.encoder.W[:, 2] = 0
        small_model.encoder.W[:, 2, 0] = small_model.lower_capsules(digit)[0]
    for row, column in ((0, 12), (8, 2), (6, 6), (12, 4)):
        frame = F.pad(digit, [column, 12 - column, row, 12 - row])
        found = best_window(answers(window_capsules(lower_map(small_model, frame), small_model.encoder.W.detach())))
        assert found.tolist() == [[row, column]]
        assert_close(small_model.encode(crop(frame, found)), small_model.encode(digit), atol=0, rtol=0)


def test_a_crop_is_the_window_and_empty_outside_the_frame():
    frame = torch.arange(1.0, 1 + 40 * 37).view(1, 1, 40, 37)
    found = crop(frame.expand(3, -1, -1, -1), torch.tensor([[5, 9], [-3, 2], [20, -7]]))
    assert_close(found[0], frame[0, :, 5:33, 9:37])
    assert_close(found[1], F.pad(frame[0, :, :25, 2:30], [0, 0, 3, 0]))
    assert_close(found[2], F.pad(frame[0, :, 20:, :21], [7, 0, 0, 8]))


def test_the_centre_of_mass_is_numpys_average(rng):
    frames = torch.rand(5, 1, 41, 37, generator=rng, dtype=torch.float64)
    found = centre_of_mass(frames)
    for frame, centre in zip(frames, found):
        rows, columns = torch.meshgrid(torch.arange(41.0), torch.arange(37.0), indexing="ij")
        expected = [(frame[0] * axis).sum() / frame.sum() for axis in (rows, columns)]
        assert_close(centre, torch.stack(expected).double())


def test_the_window_about_the_centre_of_mass_undoes_any_move(digits):
    images = digits[0][:53]
    own = crop(images, centred_window(images))
    for row, column in ((0, 0), (5, 12), (11, 2)):
        moved = F.pad(images, [column, 12 - column, row, 12 - row])
        assert_close(crop(moved, centred_window(moved)), own, atol=0, rtol=0)
    assert (centred_window(images).abs() <= 1).all()  # MNIST's digits are centred so
    assert centred_window(F.pad(torch.ones(1, 1, 28, 28), [9, 3, 5, 7])).tolist() == [[5, 9]]
