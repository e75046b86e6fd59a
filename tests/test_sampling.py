"""Poses to generate from."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from capsnb import squash
from capsnb.sampling import DOMAINS, Poses, one_at_a_time, restrict, sample_poses

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


def test_the_root_squared_is_the_covariance(poses):
    assert_close(poses.root @ poses.root.mT, poses.covariance)


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


def test_the_fitted_domain_has_the_mean_and_covariance_of_the_training_poses(poses):
    poses.mean *= 0.3  # far from the sphere, so that almost nothing is cut
    poses.covariance *= 0.1
    poses.float()
    samples = sample_poses(20_011, poses, domain="fitted", rng=torch.Generator().manual_seed(1))
    assert_close(samples.mean(0), poses.mean, rtol=0, atol=0.005)
    for j in range(4):
        assert_close(samples[:, j].T.cov(), poses.covariance[j], rtol=0.1, atol=2e-3)


@pytest.mark.parametrize("domain", DOMAINS)
def test_poses_are_shorter_than_1_and_the_same_for_the_same_seed(domain, poses):
    poses.covariance *= 100
    first, second, other = (
        sample_poses(53, poses.float(), domain=domain, rng=torch.Generator().manual_seed(seed)) for seed in (2, 2, 3)
    )
    assert torch.linalg.vector_norm(first, dim=2).max() < 1
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_long_fitted_poses_keep_their_direction(poses):
    poses.covariance.zero_()
    poses.mean.copy_(torch.linspace(1, 3, J * D).view(J, D))
    sample = sample_poses(1, poses.float(), domain="fitted", rng=torch.Generator())[0]
    assert_close(torch.nn.functional.normalize(sample, dim=1), torch.nn.functional.normalize(poses.mean, dim=1))
    assert_close(torch.linalg.vector_norm(sample, dim=1), torch.full((J,), 1 - 1e-3))


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
