"""The energy, its marginal, the firing probabilities and the gradient."""

import itertools

import paper
import pytest
import torch
from torch.testing import assert_close

from capsnb import energy, eq18_term, firing_probability, free_energy, route, squash
from capsnb.routing import forward_map

B, I, J, D, E = 3, 7, 5, 2, 11  # noqa: E741


@pytest.fixture
def model(double):
    """Lower capsules, weights and the couplings that routing gives them."""
    x, W = squash(double(B, I, E)), double(I, J, D, E)
    return x, W, route(x, W).coupling


def states():
    """All 2^J states of the upper capsules."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=J)), dtype=torch.float64)


def all_energies(x, W, coupling):
    """The energy of every image with every state, [2^J, B]."""
    return torch.stack([energy(x, state.expand(len(x), J), W, coupling) for state in states()])


def test_the_energy_is_equation_7_written_as_a_loop(model, rng):
    x, W, coupling = model
    h = torch.randint(2, (B, J), generator=rng).double()
    expected = paper.each_image(lambda x, h, c: paper.energy(x, h, W.numpy(), c), x, h, coupling)
    assert_close(energy(x, h, W, coupling), expected)


def test_the_free_energy_is_minus_the_logarithm_of_equation_10_written_as_a_loop(model):
    x, W, coupling = model
    marginal = paper.each_image(lambda x, c: paper.unnormalised_marginal(x, W.numpy(), c), x, coupling)
    assert_close(free_energy(x, W, coupling), -marginal.log())


def test_the_free_energy_sums_the_boltzmann_factors_of_all_states(model):
    assert_close(free_energy(*model), -torch.logsumexp(-all_energies(*model), dim=0))


def test_the_firing_probability_is_equation_12_written_as_a_loop(model):
    x, W, coupling = model
    expected = paper.each_image(lambda x, c: paper.firing_probability(x, W.numpy(), c), x, coupling)
    assert_close(firing_probability(forward_map(x, W, coupling)), expected)


def test_the_firing_probability_is_the_mean_state_under_the_boltzmann_distribution(model):
    chance = (-all_energies(*model)).softmax(dim=0)
    assert_close(firing_probability(forward_map(*model)), torch.einsum("sb,sj->bj", chance, states()))


def test_given_x_the_upper_capsules_fire_independently_as_equation_11_says(model):
    chance = (-all_energies(*model)).softmax(dim=0)
    p = firing_probability(forward_map(*model))
    product = torch.stack([(state * p + (1 - state) * (1 - p)).prod(1) for state in states()])
    assert_close(chance, product)


def test_the_firing_probability_is_the_length_of_the_squashed_capsule(double):
    z = double(B, J, D)
    assert_close(firing_probability(z), torch.linalg.vector_norm(squash(z), dim=2))


def test_the_term_of_equation_18_is_the_mean_of_the_loops_over_the_batch(model):
    x, W, coupling = model
    terms = paper.each_image(lambda x, c: paper.eq18_term(x, W.numpy(), c), x, coupling)
    assert_close(eq18_term(x, W, coupling), terms.mean(0))


def test_the_term_of_equation_18_is_minus_the_derivative_of_the_free_energy(model):
    x, W, coupling = model
    W.requires_grad_()
    (derivative,) = torch.autograd.grad(free_energy(x, W, coupling).mean(), W)
    assert_close(eq18_term(x, W, coupling), -derivative)


def test_the_term_of_equation_18_agrees_with_finite_differences_of_equation_10(model, double):
    x, W, coupling = model
    direction, step = double(*W.shape), 1e-5

    def log_marginal(weights):
        values = paper.each_image(lambda x, c: paper.unnormalised_marginal(x, weights.numpy(), c), x, coupling)
        return values.log().mean()

    slope = (log_marginal(W + step * direction) - log_marginal(W - step * direction)) / (2 * step)
    assert_close((eq18_term(x, W, coupling) * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_energies_are_even_in_x(model, rng):
    x, W, coupling = model
    h = torch.randint(2, (B, J), generator=rng).double()
    assert_close(energy(-x, h, W, coupling), energy(x, h, W, coupling))
    assert_close(free_energy(-x, W, coupling), free_energy(x, W, coupling))


def test_a_rotation_of_all_weights_of_an_upper_capsule_changes_no_energy(model, double):
    x, W, coupling = model
    rotations = torch.linalg.qr(double(J, D, D)).Q
    h = torch.ones(B, J, dtype=torch.float64)
    assert_close(energy(x, h, rotations @ W, coupling), energy(x, h, W, coupling))
    assert_close(free_energy(x, rotations @ W, coupling), free_energy(x, W, coupling))


def test_a_permutation_of_the_capsules_of_both_layers_changes_no_energy(model, rng):
    x, W, coupling = model
    lower, upper = torch.randperm(I, generator=rng), torch.randperm(J, generator=rng)
    permuted = x[:, lower], W[lower][:, upper], coupling[:, lower][:, :, upper]
    h = torch.randint(2, (B, J), generator=rng).double()
    assert_close(free_energy(*permuted), free_energy(*model))
    assert_close(energy(permuted[0], h[:, upper], *permuted[1:]), energy(x, h, W, coupling))


def test_longer_capsules_are_always_likelier_with_the_couplings_held(model):
    x, W, coupling = model
    assert (free_energy(1.1 * x, W, coupling) < free_energy(x, W, coupling)).all()


def test_a_capsule_of_zeros_never_fires_and_its_energy_is_finite():
    x, W, coupling = torch.zeros(1, I, E), torch.ones(I, J, D, E), torch.ones(1, I, J)
    assert energy(x, torch.ones(1, J), W, coupling).isfinite().all()
    assert_close(free_energy(x, W, coupling), torch.zeros(1))
    assert_close(firing_probability(torch.zeros(1, D)), torch.zeros(1))


@pytest.mark.parametrize("length", [0.0, 1e-20, 1.0, 1e30])
def test_firing_probabilities_have_finite_values_and_gradients(length):
    z = torch.full((D,), length, requires_grad=True)
    firing_probability(z).backward()
    assert firing_probability(z).isfinite() and z.grad.isfinite().all()
