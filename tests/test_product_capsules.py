"""Capsules on S^m x R^n x (0, 1): their energy integrated numerically, its gradient as loops, symmetries, samples."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from capsnb import mixing, sparsity, squash
from capsnb.energy import firing_probability, free_energy
from capsnb.product_capsules import (
    DOMAINS,
    ProductEncoder,
    Space,
    contrastive_divergence,
    energy,
    euclidean_deviation,
    explanation,
    free_energy_of,
    offset_like,
    sample_states,
    split,
    state,
    states_of,
    with_activation,
)
from capsnb.routing import forward_map, reverse_map
from capsnb.sampling import Poses
from capsnb.settings import ViewsSettings
from capsnb.training import train_encoder
from experiments.bases import BASES

B, I, J, D, E = 3, 13, 5, 7, 11  # noqa: E741
SPACE = Space(sphere=3, offset=0.7, variance=0.3)  # S^2 x R^4


@pytest.fixture
def layer(double):
    """Lower capsules, weights and couplings."""
    return squash(double(B, I, E)), double(I, J, D, E), double(B, I, J).softmax(2)


def test_the_free_energy_is_what_summing_over_h_and_integrating_over_r_leaves(double):
    """Two capsules on S^1 x R, on a grid of both Euclidean parts against the density of their own Gaussians."""
    space = Space(sphere=2, offset=0.7, variance=0.3)
    z, line = double(3, 2, 3), torch.linspace(-9, 9, 601).double()
    r = torch.cartesian_prod(line, line).unsqueeze(2)
    own = torch.exp(-((r[..., 0] - space.offset) ** 2).sum(1) / (2 * space.variance)).sum()
    for image in z:
        image = image.expand(len(r), 2, 3)
        states = (torch.tensor(h).double().expand(len(r), 2) for h in product((0, 1), repeat=2))
        total = sum(torch.exp(-energy(image, h, r, space)).sum() for h in states)
        assert_close(-(total / own).log(), free_energy_of(image[:1], space)[0])


def test_given_x_the_euclidean_part_is_normal_around_the_state(double):
    space = Space(sphere=2, offset=0.7, variance=0.3)
    z, r = double(1, 1, 3), torch.linspace(-9, 9, 6001).double()
    density = torch.exp(-energy(z.expand(6001, 1, 3), torch.ones(6001, 1).double(), r.view(-1, 1, 1), space))
    density = density / density.sum()
    mean = (density * r).sum()
    assert_close(mean, state(z, space)[0, 0, 2])
    assert_close((density * (r - mean) ** 2).sum(), torch.tensor(0.3).double())


def test_the_firing_probability_is_equation_12_for_the_spheres_part_alone(double):
    z = double(B, J, D)
    assert_close(torch.linalg.vector_norm(state(z, SPACE)[..., :3], dim=2), firing_probability(z[..., :3]))
    moved = torch.cat([z[..., :3], 9 * z[..., 3:]], dim=2)
    assert_close(state(moved, SPACE)[..., :3], state(z, SPACE)[..., :3])
    off, on = (energy(z, h * torch.ones(B, J).double(), double(B, J, 4) * 0, SPACE) for h in (0, 1))
    assert_close(off - on, z[..., :3].square().sum(2).log().sum(1))


def test_the_contrastive_divergence_descends_data_term_minus_model_term_written_as_loops(layer):
    x, W, c = layer
    W.requires_grad_()
    contrastive_divergence(x, W, c, SPACE).backward()
    expected, (x, W, c) = np.zeros(W.shape), (part.detach().numpy() for part in (x, W, c))
    for b in range(B):
        back, sent = np.zeros((I, E)), []
        for j in range(J):
            z = sum(c[b, i, j] * W[i, j] @ x[b, i] for i in range(I))
            s = z[:3]
            sent.append(np.concatenate([s * np.linalg.norm(s) / (1 + s @ s), np.array([0.7, 0, 0, 0]) + 0.3 * z[3:]]))
        for i, j in product(range(I), range(J)):
            back[i] += c[b, i, j] * W[i, j].T @ sent[j]
        model = back * np.linalg.norm(back, axis=1, keepdims=True) / (1 + np.sum(back**2, axis=1, keepdims=True))
        for sign, lower in ((1, x[b]), (-1, model)):
            for j in range(J):
                z = sum(c[b, i, j] * W[i, j] @ lower[i] for i in range(I))
                s = z[:3]
                slope = np.concatenate([2 * s / (1 + s @ s), np.array([0.7, 0, 0, 0]) + 0.3 * z[3:]])
                for i in range(I):
                    expected[i, j] -= sign * c[b, i, j] * np.outer(slope, lower[i]) / B
    assert_close(torch.from_numpy(expected), layer[1].grad)


def test_the_free_energy_has_the_gradient_that_finite_differences_find(layer):
    x, W, c = layer
    W = W[:2, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda W: free_energy_of(forward_map(x[:, :2], W, c[:, :2, :2]), SPACE), W)


def test_the_paper_is_the_case_without_euclidean_numbers(layer):
    x, W, c = layer
    space = Space(sphere=D)
    assert_close(free_energy_of(forward_map(x, W, c), space), free_energy(x, W, c))
    assert_close(contrastive_divergence(x, W, c, space), mixing.contrastive_divergence(x, W, c))
    assert_close(explanation(x, W, space), sparsity.explanation(x, W))
    assert_close(state(forward_map(x, W, c), space), squash(forward_map(x, W, c)))


def test_only_the_offset_tells_x_from_its_negative(layer):
    x, W, c = layer
    there, back = (forward_map(sign * x, W, c) for sign in (1, -1))
    even = replace(SPACE, offset=0.0)
    assert_close(free_energy_of(there, even), free_energy_of(back, even))
    difference = free_energy_of(back, SPACE) - free_energy_of(there, SPACE)
    assert_close(difference, 2 * 0.7 * there[..., 3].sum(1))


def test_the_sphere_may_be_turned_and_so_may_the_line_around_its_offset(double):
    z = double(B, J, D)
    turns = torch.linalg.qr(double(J, 3, 3)).Q, torch.linalg.qr(double(J, 3, 3)).Q
    s, rest = (torch.einsum("jde,bje->bjd", turn, part) for turn, part in zip(turns, (z[..., :3], z[..., 4:])))
    assert_close(free_energy_of(torch.cat([s, z[..., 3:4], rest], 2), SPACE), free_energy_of(z, SPACE))
    swapped = torch.cat([z[..., :3], z[..., 3:].flip(2)], dim=2)
    assert (free_energy_of(swapped, SPACE) - free_energy_of(z, SPACE)).abs().min() > 1e-3


def test_the_explanation_is_the_cosine_with_what_one_capsule_alone_sends_back(layer):
    x, W, _ = layer
    found = explanation(x, W, SPACE)
    for j in range(J):
        all_on, mine = torch.ones(B, I, 1).double(), W[:, j : j + 1]
        back = squash(reverse_map(state(forward_map(x, mine, all_on), SPACE), mine, all_on))
        assert_close(found[:, j], torch.nn.functional.cosine_similarity(back.flatten(1), x.flatten(1)))


def test_an_offset_makes_a_capsule_explain_x_better_or_worse_than_its_negative(layer):
    x, W, _ = layer
    even = replace(SPACE, offset=0.0)
    assert_close(explanation(x, W, even), explanation(-x, W, even))
    assert (explanation(x, W, SPACE) - explanation(-x, W, SPACE)).abs().min() > 1e-3


def test_capsules_that_are_off_are_zero_and_have_no_activation(double):
    z = double(B, J, D)
    z[:, 2] = 0
    states = states_of(z, SPACE)
    assert (states[:, 2] == 0).all() and (with_activation(states, SPACE)[:, 2] == 0).all()
    assert_close(states[:, 3], state(z, SPACE)[:, 3])
    assert_close(with_activation(states, SPACE)[:, 3, D], firing_probability(z[:, 3, :3]))


# The encoder


@pytest.fixture
def encoder():
    """An encoder of five capsules on S^2 x R^4: plain sparse experts."""
    torch.manual_seed(23)
    chosen = replace(BASES["sparse"], capsules=J, dim=D, steps=30, batch=31)
    return ProductEncoder(I, E, chosen, SPACE)


def test_one_capsule_is_on_for_every_image_and_it_is_the_one_that_explains_most(encoder, double):
    x = squash(double(B, I, E).float())
    z = encoder.eval().preactivations(x)
    assert ((z != 0).any(2).sum(1) == 1).all()
    assert ((z != 0).any(2).int().argmax(1) == explanation(x, encoder.W, SPACE).argmax(1)).all()


def test_with_two_left_on_the_couplings_are_shared_between_them(double):
    sparsity = replace(BASES["sparse"].sparsity, on_after_training=2)
    chosen = replace(BASES["sparse"], capsules=J, dim=D, sparsity=sparsity)
    c = ProductEncoder(I, E, chosen, SPACE).eval().couplings(squash(double(B, I, E).float()))
    assert ((c.amax(1) > 0).sum(1) == 2).all()
    assert_close(c.sum(2), torch.ones(B, I))


def test_training_makes_capsules_explain_more_and_moves_the_winning_shares(encoder, double):
    lower = 0.3 * double(101, I, E).float() + double(I, E).float()
    before = explanation(squash(lower), encoder.W, SPACE).amax(1).mean()
    share = encoder.sparsity.share.clone()
    for _ in train_encoder(encoder, lower, seed=3):
        pass
    assert explanation(squash(lower), encoder.W, SPACE).amax(1).mean() > before + 0.1
    assert not torch.equal(share, encoder.sparsity.share) and not encoder.training


@pytest.mark.parametrize(
    "change, sphere", [({}, 0), ({}, D + 1), ({"sparsity": None}, 3), ({"views": ViewsSettings()}, 3)]
)
def test_a_space_that_does_not_fit_dense_settings_and_views_are_refused(encoder, change, sphere):
    with pytest.raises(ValueError, match=f"sphere is {sphere}; give 1 to {D}, and sparsity settings without views"):
        ProductEncoder(I, E, replace(encoder.settings, **change), replace(SPACE, sphere=sphere))


# Samples


@pytest.fixture
def poses(rng):
    """The statistics of two capsules on S^2 x R^4 of known mean, seen in images where one of them is on."""
    states = torch.zeros(2003, 2, D)
    centre = torch.tensor([[3.0, 0, 0, 5, 1, 1, 1], [0, -3.0, 0, 2, 2, -1, 0]])
    for j, deviation in enumerate((0.5, 0.25)):
        mine = states[j::2]
        mine[:, j] = centre[j] + deviation * torch.randn(len(mine), D, generator=rng)
    poses = Poses(2, D)
    poses.fit(states)
    return poses


@pytest.mark.parametrize("domain", DOMAINS)
def test_sampled_directions_lie_on_the_sphere(domain, poses, rng):
    s = split(sample_states(101, poses, SPACE, domain=domain, rng=rng), SPACE)[0]
    assert_close(torch.linalg.vector_norm(s, dim=2), torch.ones(101, 2))


@pytest.mark.parametrize("domain", ["prior", "complete"])
def test_uniform_directions_point_everywhere(domain, poses, rng):
    s = split(sample_states(4001, poses, SPACE, domain=domain, rng=rng), SPACE)[0]
    assert s.mean(0).abs().max() < 0.05
    assert_close(s[:, 1].T.cov(), torch.eye(3) / 3, atol=0.02, rtol=0)


def test_restricted_directions_are_those_of_the_half_sphere_around_the_mean(poses, rng):
    s = split(sample_states(4001, poses, SPACE, domain="restricted", rng=rng), SPACE)[0]
    assert (s[:, 0, 0] > -0.1).all() and (s[:, 1, 1] < 0.1).all()
    assert_close(s[:, 0].mean(0), torch.tensor([0.5, 0, 0]), atol=0.05, rtol=0)  # the centroid of a half-sphere


def test_the_prior_of_the_euclidean_part_is_the_energys_own_gaussian(poses, rng):
    r = split(sample_states(4001, poses, SPACE, domain="prior", rng=rng), SPACE)[1]
    assert_close(r.mean(0), torch.tensor([[0.7, 0, 0, 0]]).expand(2, 4), atol=0.05, rtol=0)
    assert_close(r.var(0), torch.full((2, 4), 0.3), atol=0.05, rtol=0)


def test_the_complete_domain_has_the_training_mean_and_one_deviation_for_all(poses, rng):
    deviation = euclidean_deviation(poses, SPACE)
    assert deviation.item() == pytest.approx(((0.5**2 + 0.25**2) / 2) ** 0.5, rel=0.03)
    r = split(sample_states(4001, poses, SPACE, domain="complete", rng=rng), SPACE)[1]
    assert_close(r.mean(0), poses.mean[:, 3:], atol=0.05, rtol=0)
    assert_close(r.std(0), deviation.expand(2, 4), atol=0.03, rtol=0)


def test_fitted_samples_have_the_mean_and_covariance_of_the_training_states(poses, rng):
    s, r = split(sample_states(8009, poses, SPACE, domain="fitted", rng=rng), SPACE)
    assert_close(r.mean(0), poses.mean[:, 3:], atol=0.05, rtol=0)
    assert_close(r[:, 1].T.cov(), poses.covariance[1, 3:, 3:], atol=0.01, rtol=0)
    assert s[:, 0, 0].mean() > 0.9 and s[:, 1, 1].mean() < -0.9


def test_without_euclidean_numbers_there_is_no_deviation_and_no_offset(poses):
    assert euclidean_deviation(poses, Space(sphere=D)) == 0
    assert offset_like(torch.ones(2, 0), Space(sphere=D)).shape == (2, 0)
    assert offset_like(torch.ones(2, 3), SPACE).tolist() == [[pytest.approx(0.7), 0, 0]] * 2


def test_an_unknown_domain_is_refused(poses, rng):
    with pytest.raises(ValueError, match="unknown domain 'full'"):
        sample_states(3, poses, SPACE, domain="full", rng=rng)
