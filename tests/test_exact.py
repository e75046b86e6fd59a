"""Tiny models solved exactly: against loops, closed forms, symmetries, finite differences and each other."""

import itertools
import math

import numpy as np
import paper
import pytest
import torch
from torch.testing import assert_close

from capsnb import eq18_term, free_energy, squash
from capsnb.exact import (
    _drift,
    constant,
    disc_points,
    draw,
    frozen_log_likelihood,
    gradient,
    held,
    hmc,
    log_likelihood,
    log_z,
    log_z_of_one_expert,
    routed,
    uniform_in_balls,
    uniform_points,
)

B, I, J, D, E = 5, 2, 3, 7, 2  # noqa: E741
readings = pytest.mark.parametrize("couplings", [routed(), routed(rounds=2, over="lower")], ids=["over j", "over i"])
FINE = disc_points(I, 12)


@pytest.fixture
def model(double):
    """Lower capsules of two numbers, and weights."""
    return squash(double(B, I, E)), double(I, J, D, E)


@pytest.fixture
def coupling(rng):
    return torch.rand(I, J, generator=rng, dtype=torch.float64)


def integrate(points, values):
    """The mean of ``values`` at the points under the uniform density."""
    return torch.tensordot(points.weight, values, dims=1)


def mean_under(points, F, values):
    """The mean of ``values`` at the points under exp(-F)."""
    return integrate(points._replace(weight=(points.weight.log() - F).softmax(0)), values)


# Integration


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 7, 12])
def test_the_rule_for_a_disc_integrates_every_monomial_up_to_its_degree(degree):
    points = disc_points(1, degree)
    for m, n in itertools.product(range(degree + 1), repeat=2):
        if m + n > degree:
            continue
        odd = m % 2 or n % 2  # the mean of x^m y^n over the unit disc, in polar coordinates
        around = 0 if odd else math.gamma((m + 1) / 2) * math.gamma((n + 1) / 2) / math.gamma((m + n) / 2 + 1) / math.pi
        expected = torch.tensor(2 * around / (m + n + 2), dtype=torch.float64)
        x, y = points.x[:, 0].T
        assert_close(integrate(points, x**m * y**n), expected, rtol=0, atol=1e-14)


def test_the_rule_for_discs_treats_every_capsule_alike_and_its_weights_add_up_to_1():
    points = disc_points(3, 2)
    assert_close(points.weight.sum(), torch.tensor(1.0, dtype=torch.float64))
    second = integrate(points, torch.einsum("nia,nkb->niakb", points.x, points.x).flatten(1))
    assert_close(second.view(6, 6), torch.eye(6, dtype=torch.float64) / 4, rtol=0, atol=1e-14)


def test_uniform_draws_have_the_moments_of_a_ball(rng):
    x = uniform_in_balls(100_000, 2, 3, rng=rng)
    assert torch.linalg.vector_norm(x, dim=2).max() <= 1
    assert_close(x.mean(0), torch.zeros(2, 3, dtype=torch.float64), rtol=0, atol=0.01)
    second = x.flatten(1).T @ x.flatten(1) / len(x)
    assert_close(second, torch.eye(6, dtype=torch.float64) / 5, rtol=0, atol=0.005)


def test_z_is_the_sum_of_the_loops_over_the_points(model, coupling):
    _, W = model
    points = disc_points(I, 3)
    c = coupling.expand(len(points.x), -1, -1)
    terms = paper.each_image(lambda x, c: np.array(paper.unnormalised_marginal(x, W.numpy(), c)), points.x, c)
    assert_close(log_z(W, constant(coupling), points).exp(), (points.weight * terms).sum())


def test_z_with_routing_finds_the_couplings_of_every_point(model):
    _, W = model
    points = disc_points(I, 3)

    def marginal(x):
        return np.array(paper.unnormalised_marginal(x, W.numpy(), paper.routing(x, W.numpy(), 3, "upper")[0]))

    assert_close(log_z(W, routed(), points).exp(), (points.weight * paper.each_image(marginal, points.x)).sum())


def test_z_of_one_expert_is_the_closed_form(double, coupling):
    W = double(3, 1, D, 2)
    one = torch.rand(3, 1, dtype=torch.float64)
    assert_close(log_z(W, constant(one), disc_points(3, 2)), log_z_of_one_expert(W, one))


def test_uniform_draws_give_the_closed_form_for_capsules_of_any_size(double, rng):
    W, one = double(3, 1, 2, 5), torch.full((3, 1), 0.7, dtype=torch.float64)
    points = uniform_points(100_000, 3, 5, rng=rng)
    assert_close(log_z(W, constant(one), points), log_z_of_one_expert(W, one), rtol=0, atol=0.01)


def test_a_rule_of_degree_2j_is_exact_for_constant_couplings_and_one_below_is_not(model, coupling):
    _, W = model
    finer = log_z(W, constant(coupling), disc_points(I, 17))
    assert_close(log_z(W, constant(coupling), disc_points(I, 2 * J)), finer)
    assert abs(log_z(W, constant(coupling), disc_points(I, 3)) - finer) > 1e-4


# Likelihood


@readings
def test_probabilities_add_up_to_1(model, couplings):
    _, W = model
    density = log_likelihood(FINE.x, W, couplings, FINE).exp()
    assert_close(integrate(FINE, density), torch.tensor(1.0, dtype=torch.float64))


def test_what_equation_18_climbs_with_routing_is_no_density(model):
    _, W = model
    points = disc_points(I, 6)
    total = integrate(points, frozen_log_likelihood(points.x, W, routed(), points).exp())
    assert abs(total - 1) > 0.01


@readings
def test_likelihoods_are_even_and_blind_to_rotated_weights_and_to_the_order_of_experts(model, couplings, double, rng):
    x, W = model
    value = log_likelihood(x, W, couplings, FINE)
    rotations, order = torch.linalg.qr(double(J, D, D)).Q, torch.randperm(J, generator=rng)
    assert_close(log_likelihood(-x, W, couplings, FINE), value)
    assert_close(log_likelihood(x, rotations @ W, couplings, FINE), value)
    assert_close(log_likelihood(x, W[:, order], couplings, FINE), value)
    assert_close(log_likelihood(x.flip(1), W.flip(0), couplings, FINE), value)


# Gradient


def test_the_frozen_gradient_is_both_terms_of_equation_18_written_as_a_loop_over_the_data(model):
    x, W = model
    points, own = disc_points(I, 2 * J), routed()(x, W)
    expected = torch.zeros_like(W)
    for b in range(B):
        c = own[b].expand(len(points.x), -1, -1)
        each = torch.stack([eq18_term(point[None], W, own[b : b + 1]) for point in points.x])
        model_term = mean_under(points, free_energy(points.x, W, c), each)
        expected += (eq18_term(x[b : b + 1], W, own[b : b + 1]) - model_term) / B
    assert_close(gradient(x, W, routed(), points, treat="frozen"), expected)


@readings
def test_the_differentiated_gradient_agrees_with_finite_differences_of_the_likelihood(model, couplings, double):
    x, W = model
    direction, step = double(*W.shape), 1e-6
    up, down = (log_likelihood(x, W + s * step * direction, couplings, FINE).mean() for s in (1, -1))
    along = (gradient(x, W, couplings, FINE, treat="differentiated") * direction).sum()
    assert_close(along, (up - down) / (2 * step), rtol=1e-5, atol=1e-7)


@readings
def test_the_re_routed_gradient_agrees_with_finite_differences_that_keep_every_coupling(model, couplings, double):
    x, W = model
    direction, step = double(*W.shape), 1e-6
    own, everywhere = couplings(x, W), couplings(FINE.x, W)

    def kept(W):
        F = free_energy(FINE.x, W, everywhere)
        return -free_energy(x, W, own).mean() - torch.logsumexp(FINE.weight.log() - F, dim=0)

    along = (gradient(x, W, couplings, FINE, treat="re-routed") * direction).sum()
    slope = (kept(W + step * direction) - kept(W - step * direction)) / (2 * step)
    assert_close(along, slope, rtol=1e-6, atol=1e-8)


def test_with_one_round_of_routing_the_three_gradients_are_one(model):
    x, W = model
    gradients = [gradient(x, W, routed(rounds=1), FINE, treat=t) for t in ("frozen", "re-routed", "differentiated")]
    assert_close(gradients[0], gradients[2])
    assert_close(gradients[1], gradients[2])


def test_with_more_rounds_no_two_of_them_are_alike(model):
    x, W = model
    gradients = [gradient(x, W, routed(), FINE, treat=t) for t in ("frozen", "re-routed", "differentiated")]
    for a, b in itertools.combinations(gradients, 2):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) < 0.99


def test_a_small_step_along_the_differentiated_gradient_raises_the_likelihood(model):
    x, W = model
    moved = W + 1e-3 * gradient(x, W, routed(), FINE, treat="differentiated")
    assert log_likelihood(x, moved, routed(), FINE).mean() > log_likelihood(x, W, routed(), FINE).mean()


def test_held_couplings_are_the_same_and_have_no_derivative(model):
    x, W = model
    assert_close(held(routed())(x, W), routed()(x, W))
    assert not held(routed())(x, W.requires_grad_()).requires_grad


# Draws


def moments(x, F):
    """Squared lengths, inner product of two capsules, a product of two numbers, and free energy: [B, 5]."""
    products = (x[:, 0] * x[:, -1]).sum(1), x[:, 0, 0] * x[:, -1, 1]
    return torch.stack([*x.square().sum(2).T, *products, F(x)], dim=1)


def assert_drawn(x, F, points):
    """The moments of ``x`` are those under exp(-F), to within 4 standard errors."""
    expected, found = mean_under(points, F(points.x), moments(points.x, F)), moments(x, F)
    assert ((found.mean(0) - expected).abs() / (found.std(0) / len(x) ** 0.5)).max() < 4


@readings
def test_draws_have_the_moments_that_integration_gives(model, couplings, rng):
    W = model[1][:, :2, :3]
    x = draw(4_001, W, couplings, rng=rng)
    assert x.shape == (4_001, I, E)
    assert_drawn(x, lambda x: free_energy(x, W, couplings(x, W)), FINE)


def test_draws_are_right_where_the_density_reaches_the_bound_of_the_rejection(rng):
    W = 3 * torch.eye(2, dtype=torch.float64)[None, None]  # one expert of one capsule reaches it on the circle
    one = constant(torch.ones(1, 1, dtype=torch.float64))
    x = draw(4_001, W, one, rng=rng)
    assert_drawn(x, lambda x: free_energy(x, W, one(x, W)), disc_points(1, 6))


@pytest.mark.parametrize("leapfrog", [1, 4])
@pytest.mark.parametrize("start", ["draws", "the origin"])
def test_hmc_reaches_and_keeps_the_moments_that_integration_gives(model, coupling, rng, start, leapfrog):
    W, couplings = 1.5 * model[1][:, :2, :3], constant(coupling[:, :2])
    x = draw(3_001, W, couplings, rng=rng) if start == "draws" else torch.zeros(3_001, I, E, dtype=torch.float64)
    F = lambda x: free_energy(x, W, couplings(x, W))  # noqa: E731
    moved = hmc(x, F, steps=120 // leapfrog, step_size=0.3, leapfrog=leapfrog, rng=rng)
    assert_drawn(moved.x, F, FINE)
    assert 0.5 < moved.accepted < 1


def test_hmc_keeps_the_uniform_density_of_three_dimensional_balls_and_accepts_everything(rng):
    x = uniform_in_balls(20_000, 2, 3, rng=rng)
    moved = hmc(x, lambda x: 0 * x.sum((1, 2)), steps=5, step_size=0.7, rng=rng)
    length = torch.linalg.vector_norm(moved.x, dim=2)
    assert length.max() < 1 + 1e-9
    assert_close((length**3).mean(), torch.tensor(0.5, dtype=torch.float64), rtol=0, atol=0.005)  # uniform from 0 to 1
    assert_close(length.square().mean(), torch.tensor(0.6, dtype=torch.float64), rtol=0, atol=0.005)
    assert moved.accepted > 0.999


def test_a_large_step_is_rejected_more_often_and_changes_no_moment(model, coupling, rng):
    W, couplings = model[1][:, :2, :3], constant(coupling[:, :2])
    x = draw(3_001, W, couplings, rng=rng)
    F = lambda x: free_energy(x, W, couplings(x, W))  # noqa: E731
    small, large = (hmc(x, F, steps=10, step_size=size, rng=rng) for size in (0.1, 1.0))
    assert large.accepted < small.accepted
    assert_drawn(large.x, F, FINE)


def test_a_path_with_reflections_run_backwards_returns_to_its_start(double):
    x = uniform_in_balls(101, I, E, rng=torch.Generator().manual_seed(3))
    there, velocity = _drift(x, double(101, I, E), 3.0)
    back, returned = _drift(there, -velocity, 3.0)
    assert_close(back, x, rtol=0, atol=1e-9)
    assert_close(torch.linalg.vector_norm(returned), torch.linalg.vector_norm(velocity))


def test_a_path_with_reflections_is_the_one_that_a_loop_over_them_finds(double):
    x, velocity = uniform_in_balls(101, I, 3, rng=torch.Generator().manual_seed(3)), double(101, I, 3)
    place, heading = x.clone(), velocity.clone()
    for _ in range(5_000):  # Euler's steps, with a mirror at the sphere
        place = place + heading * 3.0 / 5_000
        normal, outside = torch.nn.functional.normalize(place, dim=2), place.norm(dim=2, keepdim=True) > 1
        leaves = outside & ((heading * normal).sum(2, keepdim=True) > 0)
        heading = torch.where(leaves, heading - 2 * (heading * normal).sum(2, keepdim=True) * normal, heading)
    found, turned = _drift(x, velocity, 3.0)
    assert (found - place).abs().median() < 1e-3 and (found - place).abs().mean() < 0.02
    assert (turned - heading).abs().median() < 5e-3


def test_a_capsule_that_slides_along_its_sphere_gets_there():
    x = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    there, velocity = _drift(x, torch.tensor([[[1e-4, 1.0]]], dtype=torch.float64), 1.0)
    angle = torch.tensor(1.0, dtype=torch.float64)
    assert_close(there[0, 0], torch.stack([angle.cos(), angle.sin()]), rtol=0, atol=1e-4)
    assert_close(velocity[0, 0], torch.stack([-angle.sin(), angle.cos()]), rtol=0, atol=2e-4)


# Errors


def test_a_chain_that_starts_outside_its_ball_is_refused(rng):
    with pytest.raises(ValueError, match="inside the unit balls"):
        hmc(torch.full((1, 2, 2), 0.8).double(), lambda x: x.sum((1, 2)), steps=1, step_size=0.1, rng=rng)


def test_an_unknown_treatment_of_the_couplings_and_an_empty_rule_are_refused(model):
    x, W = model
    with pytest.raises(ValueError, match="unknown treat 'thawed'"):
        gradient(x, W, routed(), FINE, treat="thawed")
    with pytest.raises(ValueError, match="degree >= 0"):
        disc_points(0, 2)
