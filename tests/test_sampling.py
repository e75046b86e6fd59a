"""Poses to generate from."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from capsnb import squash
from capsnb.sampling import COMPONENTS, DOMAINS, Poses, one_at_a_time, restrict, sample_layers, sample_poses

B, J, D = 3, 5, 7


@pytest.fixture
def capsules(double):
    """Poses of 211 images, scattered around another mean for every capsule; capsule 4 never wins."""
    poses = squash(0.3 * double(J, D) + double(211, J, D))
    poses[:, 4] *= 1e-3
    return poses


@pytest.fixture
def poses(capsules):
    poses = Poses(J, D).double()
    poses.fit(capsules)
    return poses


def test_mean_covariance_and_share_are_those_of_the_images_that_each_capsule_wins(capsules, poses):
    winner = [max(range(J), key=lambda j: np.linalg.norm(image[j])) for image in capsules.numpy()]
    for j in range(4):
        mine = np.array([image[j] for image, best in zip(capsules.numpy(), winner) if best == j])
        assert len(mine) > 2
        assert_close(poses.mean[j], torch.as_tensor(mine.mean(0)))
        assert_close(poses.covariance[j], torch.as_tensor(np.cov(mine.T)))
        assert_close(poses.share[j].item(), len(mine) / 211)
        assert_close(poses.length[j].item(), np.linalg.norm(mine, axis=1).mean())


def test_a_capsule_that_wins_nothing_keeps_zeros_and_samples_zeros(poses, rng):
    assert poses.share[4] == 0 and poses.mean[4].abs().max() == 0 and poses.covariance[4].abs().max() == 0
    samples = sample_poses(B, poses.float(), domain="fitted", rng=rng)
    assert_close(samples[:, 4], torch.zeros(B, D))


def test_a_capsule_that_wins_one_image_has_finite_statistics(double):
    capsules = squash(double(7, J, D))
    capsules[1:, 1:] = 0
    capsules[0, 2] *= 1 / torch.linalg.vector_norm(capsules[0, 2]) * 0.9999
    poses = Poses(J, D).double()
    poses.fit(capsules)
    assert poses.share[2] == 1 / 7
    assert all(value.isfinite().all() for value in poses.state_dict().values())


def test_the_mixture_is_fitted_to_the_directions_of_the_poses_with_fewer_components_for_fewer_poses(capsules, poses):
    winner = torch.linalg.vector_norm(capsules, dim=2).argmax(1)
    for j in range(4):
        directions = torch.nn.functional.normalize(capsules[winner == j, j], dim=1)
        used = int((poses.weights[j] > 0).sum())
        assert used == max(1, len(directions) // (4 * D)) < COMPONENTS
        weights, centres, roots = (value[j, :used] for value in (poses.weights, poses.centres, poses.roots))
        assert_close(weights.sum().item(), 1.0)
        # What the maximum of the likelihood has in common with its data, whatever the components: mean and covariance.
        assert_close(weights @ centres, directions.mean(0), rtol=0, atol=1e-3)
        second = torch.einsum("k,kde->de", weights, roots @ roots.mT + centres[:, :, None] * centres[:, None])
        assert_close(second, directions.T @ directions / len(directions), rtol=0, atol=1e-3)


def test_the_complete_domain_is_a_squashed_standard_gaussian(poses):
    """Of 16,001 draws: directions without a preference, and lengths n with n/(1 - n) chi-squared."""
    poses.float()
    samples = sample_poses(16_001, poses, domain="complete", rng=torch.Generator().manual_seed(1))[:, 0]
    length = torch.linalg.vector_norm(samples, dim=1)
    square = length / (1 - length)
    assert_close(square.mean().item(), float(D), rtol=0.02, atol=0)
    assert_close(square.var().item(), 2.0 * D, rtol=0.05, atol=0)
    directions = samples / length[:, None]
    assert_close(directions.mean(0), torch.zeros(D), rtol=0, atol=0.02)
    assert_close(directions.T.cov(), torch.eye(D) / D, rtol=0, atol=0.01)


def test_the_restricted_domain_is_the_complete_one_turned_towards_the_mean_pose(poses):
    poses.float()
    complete, restricted = (
        sample_poses(101, poses, domain=domain, rng=torch.Generator().manual_seed(1))
        for domain in ("complete", "restricted")
    )
    for draw, turned in zip(complete.flatten(0, 1), restricted.flatten(0, 1)):
        assert_close(turned, draw) if torch.equal(turned.sign(), draw.sign()) else assert_close(turned, -draw)
    assert ((restricted * poses.mean).sum(2) >= 0).all()
    assert ((complete * poses.mean).sum(2) < 0).any()


def test_poses_are_turned_only_where_they_point_away_from_the_mean():
    mean = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    pose = torch.tensor([[[-3.0, 1.0], [5.0, -0.1]], [[0.0, 7.0], [1.0, 1.0]]])
    expected = torch.tensor([[[3.0, -1.0], [5.0, -0.1]], [[0.0, 7.0], [-1.0, -1.0]]])
    assert_close(restrict(pose, mean), expected)


def test_the_fitted_domain_takes_each_component_as_often_as_its_weight_says(poses):
    poses.float().roots.zero_()
    poses.weights.copy_(torch.arange(COMPONENTS).expand(J, -1) / 45)
    poses.centres.copy_(torch.randn(J, COMPONENTS, D, generator=torch.Generator().manual_seed(3)))
    samples = sample_poses(20_011, poses, domain="fitted", rng=torch.Generator().manual_seed(1))
    for j in range(4):
        expected = poses.length[j] * torch.nn.functional.normalize(poses.centres[j], dim=1)
        distance = torch.cdist(samples[:, j], expected)
        assert distance.amin(1).max() < 1e-3
        found = torch.bincount(distance.argmin(1), minlength=COMPONENTS) / 20_011
        assert_close(found, poses.weights[j], rtol=0, atol=0.01)


def test_within_a_component_the_fitted_domain_has_its_covariance(poses):
    """Far from 0, so that bringing the poses to the sphere does nothing but divide them by the centre's length."""
    root = torch.randn(D - 1, D - 1, generator=torch.Generator().manual_seed(3))
    poses.float().roots.zero_()
    poses.roots[:, :, 1:, 1:] = root
    poses.centres.zero_()
    poses.centres[..., 0] = 1e4
    poses.length.fill_(1.0)
    samples = 1e4 * sample_poses(20_011, poses, domain="fitted", rng=torch.Generator().manual_seed(1))
    for j in range(J):
        assert_close(samples[:, j, 1:].T.cov(), root @ root.T, rtol=0.05, atol=0.1)


def test_a_layer_has_one_capsule_on_as_often_as_it_won_with_a_pose_of_the_domain(poses):
    poses.float()
    for domain in DOMAINS:
        layers = sample_layers(10_007, poses, domain=domain, rng=torch.Generator().manual_seed(1))
        on = layers.abs().amax(2) > 0
        assert (on.sum(1) == 1).all()
        assert_close(on.float().mean(0), poses.share, rtol=0, atol=0.015)
    lengths = torch.linalg.vector_norm(layers, dim=2).sum(1)
    assert_close(lengths, poses.length[on.float().argmax(1)])


@pytest.mark.parametrize("domain", DOMAINS)
def test_poses_are_shorter_than_1_and_the_same_for_the_same_seed(domain, poses):
    poses.roots *= 100
    first, second, other = (
        sample_poses(53, poses.float(), domain=domain, rng=torch.Generator().manual_seed(seed)) for seed in (2, 2, 3)
    )
    assert torch.linalg.vector_norm(first, dim=2).max() < 1
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_an_unknown_domain_lists_the_known_ones(poses, rng):
    with pytest.raises(ValueError, match="unknown domain 'half'; choose one of 'complete', 'restricted', 'fitted'"):
        sample_poses(B, poses, domain="half", rng=rng)


def test_one_capsule_at_a_time_keeps_its_pose_and_has_the_others_off(double):
    poses = double(B, J, D)
    layers = one_at_a_time(poses)
    for b in range(B):
        for on in range(J):
            for j in range(J):
                assert_close(layers[b, on, j], poses[b, j] if j == on else torch.zeros(D, dtype=torch.float64))
