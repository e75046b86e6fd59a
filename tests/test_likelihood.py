"""Annealed importance sampling against what is known exactly: integrals, a closed form, enumeration."""

import pytest
import torch
from torch.testing import assert_close

from capsnb import exact, squash
from capsnb.baselines import rbm as rbms
from capsnb.baselines.rbm import RBM, new_rbm
from capsnb.energy import free_energy
from capsnb.exact import constant, disc_points, routed, uniform_in_balls
from capsnb.likelihood import (
    anneal,
    anneal_capsules,
    anneal_rbm,
    between,
    frozen_log_likelihood,
    independent_pixels,
    ladder,
    log_mean,
    log_z_of_each_expert,
    rerouted,
    tune,
)
from capsnb.model import CapsuleEncoder
from capsnb.settings import EncoderSettings
from capsnb.sparsity import explanation

I, J, D, E = 2, 3, 5, 2  # noqa: E741
FINE = disc_points(I, 24)
readings = pytest.mark.parametrize("couplings", [routed(), routed(over="lower")], ids=["over j", "over i"])


def one_on(x, W):
    """Couplings of the sparse preset: the capsule that explains x best takes everything."""
    winner = torch.nn.functional.one_hot(explanation(x, W).argmax(1), W.shape[1])
    return winner.to(x)[:, None].expand(-1, x.shape[1], -1)


def with_couplings(W, couplings):
    return lambda x: free_energy(x, W, couplings(x, W).detach())


def annealed(F, chains, lower, dim, temperatures, rng, leapfrog=2):
    """Weights and states of chains led from the uniform density to exp(-F)."""
    start = uniform_in_balls(chains + 29, lower, dim, rng=rng)
    sizes = tune(F, start[:29], temperatures, leapfrog=leapfrog, rng=rng)
    return anneal_capsules(F, start[29:], temperatures, step_sizes=sizes, leapfrog=leapfrog, rng=rng)


def assert_estimates(log_weight, truth, within):
    """The estimate is the truth to within 4 standard errors, and these are small enough for that to mean something."""
    found = log_mean(log_weight)
    assert abs(found.value - truth) < 4 * found.error and 4 * found.error < within


# Weights


def test_the_mean_of_weights_its_error_and_the_effective_sample_size_are_those_of_plain_arithmetic(double):
    log_weight = double(101) - 700
    weight = (log_weight + 700).exp()
    found = log_mean(log_weight)
    assert found.value == pytest.approx(weight.mean().log().item() - 700)
    assert found.error == pytest.approx((weight.std() / weight.mean() / 101**0.5).item())
    assert found.effective == pytest.approx((weight.sum() ** 2 / weight.square().sum()).item())


def test_equal_weights_are_all_effective_and_one_among_small_ones_stands_alone():
    assert log_mean(torch.zeros(7)).effective == pytest.approx(7) and log_mean(torch.zeros(7)).error == 0
    assert log_mean(torch.tensor([0.0, -99.0, -99.0])).effective == pytest.approx(1)


def test_one_weight_has_no_error_and_is_refused():
    with pytest.raises(ValueError, match="at least 2 chains"):
        log_mean(torch.zeros(1))


def test_weights_of_three_long_steps_are_unbiased_all_the_same(rng):
    """Normal densities of growing precision, where Z is known; the move keeps them, and often stands still."""

    def move(x, precision):
        proposal = x + torch.randn(x.shape, generator=rng, dtype=x.dtype)
        gain = precision * (x.square() - proposal.square()) / 2
        return torch.where(torch.rand(x.shape, generator=rng, dtype=x.dtype).log() < gain, proposal, x)

    start = torch.randn(40_009, generator=rng, dtype=torch.float64)
    found = anneal(start, [1.0, 2.0, 4.0, 9.0], lambda x, a, b: (a - b) * x.square() / 2, move)
    assert_estimates(found.log_weight, -torch.tensor(3.0).log().item(), within=0.1)


# Capsules


@pytest.mark.parametrize("scale", [1, 5])
@readings
def test_annealing_finds_the_log_z_that_integration_gives(couplings, scale, double, rng):
    W = scale * double(I, J, D, E)
    truth = exact.log_z(W, couplings, FINE).item()
    found = annealed(with_couplings(W, couplings), 503, I, E, ladder(31), rng)
    assert_estimates(found.log_weight, truth, within=0.15)


def test_annealing_finds_the_closed_form_of_one_expert_in_more_dimensions(double, rng):
    W = double(13, 1, 7, 11)
    ones = constant(torch.ones(13, 1, dtype=torch.float64))
    found = annealed(with_couplings(W, ones), 503, 13, 11, ladder(31), rng)
    assert_estimates(found.log_weight, exact.log_z_of_one_expert(W, torch.ones(13, 1).double()).item(), within=0.1)


def test_annealing_finds_log_z_of_a_density_that_jumps_where_another_capsule_wins(double, rng):
    W = 3 * double(I, J, D, E)
    points = exact.uniform_points(100_003, I, E, rng=rng)
    found = annealed(with_couplings(W, one_on), 1_009, I, E, ladder(31), rng)
    assert len(one_on(points.x, W)[:, 0].argmax(1).unique()) > 1
    assert_estimates(found.log_weight, exact.log_z(W, one_on, points).item(), within=0.1)


def test_more_temperatures_make_the_weights_more_alike(double, rng):
    F = with_couplings(5 * double(I, J, D, E), routed())
    errors = [log_mean(annealed(F, 503, I, E, ladder(steps), rng).log_weight).error for steps in (1, 8, 64)]
    assert errors[1] < 0.85 * errors[0] and errors[2] < 0.5 * errors[1]


def test_led_both_ways_the_chains_enclose_the_truth_and_more_temperatures_close_the_gap(double, rng):
    W, couplings = 2 * double(I, 2, D, E), routed()
    F, truth, gaps = with_couplings(W, couplings), exact.log_z(W, couplings, FINE).item(), []
    draws = exact.draw(503, W, couplings, rng=rng)
    for steps in (2, 30):
        up = annealed(F, 503, I, E, ladder(steps), rng).log_weight
        sizes = tune(F, draws[:29], ladder(steps)[::-1], rng=rng)
        down = anneal_capsules(F, draws, ladder(steps)[::-1], step_sizes=sizes, rng=rng).log_weight
        assert up.mean() < truth < -down.mean()
        assert_estimates(down, -truth, within=0.3)
        gaps.append(-down.mean() - up.mean())
    assert gaps[1] < 0.2 * gaps[0]


def test_the_chains_end_as_draws_from_the_model(double, rng):
    W = 2 * double(I, J, D, E)
    F = with_couplings(W, routed())
    ends = annealed(F, 1_009, I, E, ladder(31), rng).state
    weight = (FINE.weight.log() - F(FINE.x)).softmax(0)
    for moment in (lambda x: x.square().sum((1, 2)), F):
        found, expected = moment(ends), weight @ moment(FINE.x)
        assert abs(found.mean() - expected) < 4 * found.std() / len(found) ** 0.5


def test_the_steps_shrink_where_the_density_grows_steep_and_are_as_long_as_the_target_allows(double, rng):
    W = 30 * double(I, J, D, E)
    F = with_couplings(W, constant(torch.full((I, J), 0.5, dtype=torch.float64)))
    x = uniform_in_balls(211, I, E, rng=rng)
    sizes = tune(F, x, ladder(100), rng=rng)
    assert len(sizes) == 101 and max(sizes) <= 1 and sizes[-1] < 0.5 * max(sizes)
    ends = anneal_capsules(F, x, ladder(100), step_sizes=sizes, rng=rng).state
    assert 0.2 < exact.hmc(ends, F, steps=20, step_size=sizes[-1], leapfrog=1, rng=rng).accepted < 0.7


def test_every_temperature_needs_a_step_size(rng):
    with pytest.raises(ValueError, match="shorter"):
        anneal_capsules(lambda x: x.sum((1, 2)), torch.zeros(3, I, E), ladder(3), step_sizes=[0.1] * 3, rng=rng)


def test_a_ladder_has_equal_rungs_or_closer_ones_towards_the_end():
    assert ladder(4) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert ladder(4, power=2.0) == pytest.approx([0, 7 / 16, 3 / 4, 15 / 16, 1])


# Trained encoders


def test_the_free_energy_of_a_sparse_encoder_is_that_of_the_winner_alone(small_model, digits):
    x, W = small_model.lower_capsules(digits[0][:11]).detach(), small_model.encoder.W.detach()
    winner = explanation(x, W).argmax(1).tolist()
    z = [sum(W[i, j] @ x[b, i] for i in range(len(W))) for b, j in enumerate(winner)]
    expected = torch.stack([-(1 + vector @ vector).log() for vector in z])
    assert_close(rerouted(small_model.encoder)(x), expected)


def test_the_force_takes_couplings_for_constants(rng):
    torch.manual_seed(3)
    encoder = CapsuleEncoder(13, 11, EncoderSettings(capsules=J, dim=D)).eval()
    x, W = squash(torch.randn(7, 13, 11, generator=rng)).requires_grad_(), encoder.W.detach()
    held = free_energy(x, W, encoder.couplings(x))
    found = rerouted(encoder)(x)
    assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(held.sum(), x))
    assert not rerouted(encoder)(x.detach()).requires_grad


def test_every_expert_alone_has_the_closed_form_of_one(double):
    W = double(13, J, D, 11)
    ones = torch.ones(13, 1).double()
    expected = [exact.log_z_of_one_expert(W[:, [j]], ones) for j in range(J)]
    assert_close(log_z_of_each_expert(W), torch.stack(expected))


def test_the_frozen_likelihood_is_that_of_the_winner_as_the_only_expert(small_model, digits):
    x, W = small_model.lower_capsules(digits[0][:307]).detach(), small_model.encoder.W.detach()
    winner, ones = explanation(x, W).argmax(1), torch.ones(len(W), 1)
    assert len(winner.unique()) > 1
    found = frozen_log_likelihood(small_model.encoder, x)
    for b in (0, 5, 11, 306):
        alone = W[:, [winner[b]]]
        truth = -free_energy(x[[b]], alone, ones[None]) - exact.log_z_of_one_expert(alone, ones)
        assert_close(found[[b]], truth)


def test_where_capsules_share_the_couplings_the_frozen_likelihood_is_unknown(rng):
    encoder = CapsuleEncoder(13, 11, EncoderSettings(capsules=J, dim=D)).eval()
    assert frozen_log_likelihood(encoder, squash(torch.randn(7, 13, 11, generator=rng))) is None


# RBMs


@pytest.fixture
def rbm(double):
    return RBM(double(13, 7), double(13), double(7))


def test_annealing_an_rbm_finds_the_log_z_that_enumeration_gives(rbm, rng):
    base = new_rbm(torch.rand(5, 13, generator=rng).double(), 7, rng=rng, deviation=0.0)
    v, log_z_base = independent_pixels(base, 503, rng=rng)
    found = anneal_rbm(rbm, base, v, ladder(100), rng=rng)
    assert_estimates(found.log_weight, (rbms.log_z(rbm) - log_z_base).item(), within=0.2)


def test_an_rbm_led_down_from_its_own_draws_has_the_inverse_weights(rbm, rng):
    base = new_rbm(torch.rand(5, 13, generator=rng).double(), 7, rng=rng, deviation=0.0)
    states = rbms.all_states(13).double()
    draws = states[(-rbms.free_energy(rbm, states)).softmax(0).multinomial(503, replacement=True, generator=rng)]
    found = anneal_rbm(rbm, base, draws, ladder(100)[::-1], rng=rng)
    assert_estimates(found.log_weight, (rbms.log_z(base) - rbms.log_z(rbm)).item(), within=0.2)


def test_the_chains_of_an_rbm_end_as_its_draws(rbm, rng):
    base = new_rbm(torch.full((1, 13), 0.5).double(), 7, rng=rng, deviation=0.0)
    ends = anneal_rbm(rbm, base, independent_pixels(base, 4_001, rng=rng)[0], ladder(100), rng=rng).state
    assert_close(ends.mean(0), rbms.model_term(rbm).b, rtol=0, atol=0.04)


def test_independent_pixels_have_the_log_z_of_enumeration_and_their_probabilities(rbm, rng):
    base = RBM(torch.zeros_like(rbm.w), rbm.b, rbm.c)
    v, found = independent_pixels(base, 10_007, rng=rng)
    assert_close(found, rbms.log_z(base))
    assert_close(v.mean(0), rbm.b.sigmoid(), rtol=0, atol=0.025)


def test_the_energy_between_two_rbms_is_the_weighted_sum_of_theirs(rbm, double):
    other = RBM(double(13, 7), double(13), double(7))
    v, h = (double(3, units).gt(0).double() for units in (13, 7))
    expected = 0.7 * rbms.energy(rbm, v, h) + 0.3 * rbms.energy(other, v, h)
    assert_close(rbms.energy(between(rbm, other, 0.3), v, h), expected)


def test_pixels_of_an_rbm_with_weights_are_not_independent(rbm, rng):
    with pytest.raises(ValueError, match="this RBM has weights"):
        independent_pixels(rbm, 5, rng=rng)
