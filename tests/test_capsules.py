"""The squash, its inverse, and the reshape between feature maps and capsules."""

import math

import paper
import pytest
import torch
from torch.testing import assert_close

from capsnb import squash, unsquash
from capsnb.capsules import from_capsules, to_capsules

EXTREMES = {
    "zero": [0.0, 0.0, 0.0],
    "tiny": [1e-30, -1e-30, 0.0],
    "short": [1e-13, 0.0, 1e-13],
    "unit": [0.6, 0.0, -0.8],
    "long": [3.0, -4.0, 0.0],
    "huge": [1e30, 0.0, -1e30],
}


def test_squash_is_equation_4_written_as_a_loop(double):
    z = double(11, 5)
    z[3] = 0
    assert_close(squash(z), paper.each_image(paper.squash, z))


def test_unsquash_is_equation_6_written_as_a_loop(double):
    x = squash(double(11, 5))
    x[3] = 0
    assert_close(unsquash(x), paper.each_image(paper.unsquash, x))


def test_squash_and_unsquash_undo_each_other(double):
    z = double(11, 5) * torch.logspace(-3, 2, 11, dtype=torch.float64)[:, None]
    assert_close(unsquash(squash(z)), z)
    x = squash(z)
    assert_close(squash(unsquash(x)), x)


@pytest.mark.parametrize("function", [squash, unsquash])
def test_a_rotation_and_a_sign_pass_through(function, double):
    x = 0.3 * torch.nn.functional.normalize(double(11, 5), dim=1)
    rotation = torch.linalg.qr(double(5, 5)).Q
    assert_close(function(x @ rotation), function(x) @ rotation)
    assert_close(function(-x), -function(x))


@pytest.mark.parametrize("function", [squash, unsquash])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXTREMES)
def test_values_and_gradients_are_finite_at_the_extremes(function, dtype, name):
    capsule = torch.tensor(EXTREMES[name], dtype=dtype, requires_grad=True)
    result = function(capsule)
    result.sum().backward()
    assert result.isfinite().all() and capsule.grad.isfinite().all()


@pytest.mark.parametrize("function", [squash, unsquash])
def test_the_zero_capsule_stays_zero_with_a_zero_gradient(function):
    capsule = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    result = function(capsule)
    result.sum().backward()
    assert_close(result, torch.zeros_like(result))
    assert_close(capsule.grad, torch.zeros_like(result))


def test_a_huge_capsule_is_squashed_to_length_1_in_its_own_direction():
    assert_close(squash(torch.tensor([3e30, -4e30])), torch.tensor([0.6, -0.8]))


def test_capsules_of_length_1_and_more_are_unsquashed_to_one_finite_length_in_their_own_direction():
    longest = math.sqrt((1 - 1e-6) / 1e-6)
    direction = torch.tensor([0.6, -0.8], dtype=torch.float64)
    for length in (1.0, 7.0, 1e30):
        assert_close(unsquash(length * direction), longest * direction)
    assert_close(unsquash(1e30 * direction.float()), longest * direction.float(), rtol=0.02, atol=0)


@pytest.mark.parametrize("function", [squash, unsquash])
def test_gradients_agree_with_finite_differences(function, double):
    x = (0.4 * torch.nn.functional.normalize(double(7, 5), dim=1)).requires_grad_()
    assert torch.autograd.gradcheck(function, x)


@pytest.mark.parametrize("function", [squash, unsquash])
def test_integers_are_refused_with_the_remedy(function, as_users_run):
    with pytest.raises(ValueError, match=r"floating-point.*\.float\(\)"):
        function(torch.ones(2, 3, dtype=torch.long))


def test_the_channels_of_one_position_become_its_capsules(double):
    features = double(2, 3 * 5, 7, 11)
    capsules = to_capsules(features, 5)
    assert capsules.shape == (2, 7 * 11 * 3, 5)
    for row in range(7):
        for column in range(11):
            for group in range(3):
                place = (row * 11 + column) * 3 + group
                assert_close(capsules[:, place], features[:, 5 * group : 5 * group + 5, row, column])


def test_a_feature_map_comes_back_from_its_capsules(double):
    features = double(2, 15, 7, 11)
    assert_close(from_capsules(to_capsules(features, 5), (15, 7, 11)), features)


def test_a_capsule_size_that_does_not_fit_is_refused(double):
    with pytest.raises(ValueError, match="choose a divisor of 15"):
        to_capsules(double(2, 15, 7, 11), 4)
    with pytest.raises(ValueError, match=r"do not fill a feature map of shape \(15, 7, 13\)"):
        from_capsules(double(2, 231, 5), (15, 7, 13))
