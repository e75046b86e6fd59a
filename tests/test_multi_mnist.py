"""MultiMNIST: which two digits, where they lie, and what their overlay is."""

import pytest
import torch
from torch.testing import assert_close

from capsnb.multi_mnist import SIZE, draw_pairs, draw_rows


def test_every_pair_is_two_digits_of_the_data_each_moved_whole_and_their_clipped_sum(digits, rng):
    images, labels = digits[0][:29], digits[1][:29]
    pairs, shifts = draw_pairs(images, labels, 101, rng=rng), set()
    assert pairs.images.shape == (101, 1, 36, 36) and SIZE == 36
    for image, two, classes in zip(pairs.images[:, 0], pairs.digits[:, :, 0], pairs.labels):
        assert_close(image, torch.minimum(two[0] + two[1], torch.ones(36, 36)))
        for digit, label in zip(two, classes):
            places = [
                (row, column)
                for row in range(9)
                for column in range(9)
                for known in images[labels == label, 0]
                if torch.equal(digit[row : row + 28, column : column + 28], known)
                and digit.sum().item() == pytest.approx(known.sum().item())
            ]
            assert places
            shifts.update(places[:1] if len(places) == 1 else [])
    assert {row for row, _ in shifts} == {column for _, column in shifts} == set(range(9))
    assert pairs.images.max() == 1 and (pairs.digits.sum(1) > 1).any()


def test_the_second_digit_is_any_of_another_class_each_as_often(rng):
    labels = torch.tensor([3, 1, 3, 3, 7, 1, 7, 3, 1, 3, 9])
    rows = draw_rows(labels, 60_000, rng=rng)
    counts = torch.zeros(11, 11).index_put((rows[:, 0], rows[:, 1]), torch.ones(()), accumulate=True)
    for first in range(11):
        other = labels != labels[first]
        assert (counts[first, ~other] == 0).all()
        expected = 60_000 / 11 / int(other.sum())
        assert ((counts[first, other] - expected).abs() < 5 * expected**0.5).all()


def test_the_same_seed_draws_the_same_pairs_and_another_seed_others(digits):
    first, again, other = (draw_pairs(*digits, 31, rng=torch.Generator().manual_seed(seed)) for seed in (2, 2, 3))
    assert all(torch.equal(one, two) for one, two in zip(first, again))
    assert not torch.equal(first.images, other.images)


def test_images_of_one_class_and_images_out_of_range_are_refused(digits, rng):
    with pytest.raises(ValueError, match="the labels have 1 class"):
        draw_pairs(digits[0][:3], torch.tensor([4, 4, 4]), 5, rng=rng)
    with pytest.raises(ValueError, match="divide 8-bit images by 255"):
        draw_pairs(digits[0] * 255, digits[1], 5, rng=rng)
