"""Mixing by dynamic routing and the contrastive divergence."""

import paper
import pytest
import torch
from torch.testing import assert_close

from capsnb import eq18_term, free_energy, mix, route, squash
from capsnb.mixing import contrastive_divergence

B, I, J, D, E = 3, 7, 5, 2, 11  # noqa: E741
both = pytest.mark.parametrize("over", ["upper", "lower"])


@pytest.fixture
def layer(double):
    return squash(double(B, I, E)), double(I, J, D, E)


@both
def test_mixing_is_algorithm_1_written_as_loops(layer, over):
    x, W = layer
    coupling = route(x, W, over=over).coupling
    x_model, z_model = paper.each_image(lambda x, c: paper.mixing(x, W.numpy(), c), x, coupling)
    assert_close(mix(x, W, coupling).x, x_model)
    assert_close(mix(x, W, coupling).z, z_model)


@both
def test_the_derivative_of_the_contrastive_divergence_is_minus_the_update_of_algorithm_1(layer, over):
    x, W = layer
    W.requires_grad_()
    coupling = route(x, W, over=over).coupling
    (derivative,) = torch.autograd.grad(contrastive_divergence(x, W, coupling), W)
    changes = paper.each_image(lambda x, c: paper.update(x, W.detach().numpy(), c), x, coupling)
    assert_close(-derivative, changes.mean(0))


def test_the_derivative_of_the_contrastive_divergence_is_the_difference_of_two_terms_of_equation_18(layer):
    x, W = layer
    W.requires_grad_()
    coupling = route(x, W).coupling
    (derivative,) = torch.autograd.grad(contrastive_divergence(x, W, coupling), W)
    x_model = mix(x, W, coupling).x
    assert_close(-derivative, eq18_term(x, W, coupling) - eq18_term(x_model, W, coupling))


def test_the_contrastive_divergence_is_the_free_energy_of_the_data_less_that_of_the_mixed_data(layer):
    x, W = layer
    coupling = route(x, W).coupling
    difference = free_energy(x, W, coupling) - free_energy(mix(x, W, coupling).x, W, coupling)
    assert_close(contrastive_divergence(x, W, coupling), difference.mean())


def test_no_derivative_reaches_the_couplings(layer):
    x, W = layer
    coupling = route(x, W).coupling.requires_grad_()
    contrastive_divergence(x, W.requires_grad_(), coupling).backward()
    assert coupling.grad is None and W.grad.abs().sum() > 0


def test_mixing_negates_what_is_negated(layer):
    x, W = layer
    coupling = route(x, W).coupling
    assert_close(mix(-x, W, coupling), tuple(-part for part in mix(x, W, coupling)))
    assert_close(contrastive_divergence(-x, W, coupling), contrastive_divergence(x, W, coupling))


def test_rotated_weights_mix_to_the_same_lower_capsules(layer, double):
    x, W = layer
    coupling, rotations = route(x, W).coupling, torch.linalg.qr(double(J, D, D)).Q
    plain, rotated = mix(x, W, coupling), mix(x, rotations @ W, coupling)
    assert_close(rotated.x, plain.x)
    assert_close(rotated.z, (rotations @ plain.z.unsqueeze(3)).squeeze(3))


def test_mixed_capsules_are_shorter_than_1(layer):
    x, W = layer
    assert torch.linalg.vector_norm(mix(x, 100 * W, route(x, W).coupling).x, dim=2).max() < 1
