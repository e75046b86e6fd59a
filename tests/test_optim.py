"""Momentum whose step is made orthogonal."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from capsnb.optim import OrthogonalMomentum, orthogonal

I, J, D, E = 11, 3, 5, 7  # noqa: E741


def nearest(weights):
    """For each j the polar factor U Vᵀ of the matrix [d, I·e], from numpy's singular values."""
    result = np.zeros_like(weights)
    for j in range(J):
        matrix = np.concatenate(list(weights[:, j]), axis=1)
        left, _, right = np.linalg.svd(matrix, full_matrices=False)
        result[:, j] = np.split(left @ right, I, axis=1)
    return result


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_step_is_the_nearest_matrix_with_orthonormal_rows_whatever_its_length(scale, double):
    weights = scale * double(I, J, D, E)
    assert_close(orthogonal(weights), torch.as_tensor(nearest(weights.numpy())))


def test_a_rotation_of_a_capsule_rotates_its_step(double):
    weights, rotations = double(I, J, D, E), torch.linalg.qr(double(J, D, D)).Q
    assert_close(orthogonal(rotations @ weights), rotations @ orthogonal(weights))


def test_directions_without_any_length_stay_without_and_zero_stays_zero(double):
    weights = double(I, J, D, E)
    weights[:, :, 2:] = 0
    found = orthogonal(weights)
    assert_close(found[:, :, 2:], torch.zeros_like(found[:, :, 2:]))
    assert_close(found[:, :, :2].square().sum((0, 3)), torch.ones(J, 2, dtype=torch.float64))
    assert_close(orthogonal(torch.zeros(I, J, D, E)), torch.zeros(I, J, D, E))


def test_updates_are_momentum_and_decoupled_decay_written_out(double):
    weights = torch.nn.Parameter(double(I, J, D, E))
    expected, memory = weights.detach().numpy().copy(), 0.0
    optimiser = OrthogonalMomentum([weights], lr=0.3, momentum=0.7, weight_decay=0.1)
    for _ in range(3):
        weights.grad = double(I, J, D, E)
        optimiser.step()
        memory = 0.7 * memory + weights.grad.numpy()
        expected = (1 - 0.3 * 0.1) * expected - 0.3 * nearest(memory)
    assert_close(weights.detach(), torch.as_tensor(expected))
