"""The systems beside expert capsules as the explorer sees them: poses, images to poses and back."""

import pytest
import torch
from torch.testing import assert_close

from capsnb import data, movable
from capsnb.baselines.capsnet import CapsNet
from capsnb.explorer import decode_alone, shown_pose, strip, strip_poses

IMAGES = 500


@pytest.fixture
def images():
    return data.load("mnist", "test", sample=True)[0][:11]


def test_a_network_is_moved_by_its_upper_capsules(small_networks, images):
    for network, moved in small_networks.values():
        codes = network.encode(images)
        assert_close(moved.encode(images), codes)
        assert_close(moved.decode(codes), network.decode(codes))


def test_one_capsule_is_decoded_as_the_network_masks_it(small_networks, images):
    network, moved = small_networks["capsnet"]
    assert isinstance(network, CapsNet)
    codes = network.encode(images)
    reconstructed = network.reconstruct(codes, torch.full((11,), 3))
    assert_close(decode_alone(moved, 3, codes[:, 3]), reconstructed)


def test_the_poses_are_those_of_the_training_images_that_a_capsule_wins(small_networks):
    training = data.load("mnist", "train", sample=True)[0][:IMAGES]
    for network, moved in small_networks.values():
        codes = network.encode(training)
        longest = codes.norm(dim=2).argmax(1)
        for j in longest.unique():
            mine = codes[longest == j, j]
            if len(mine) > 1:
                assert_close(moved.poses.mean[j], mine.mean(0))
                assert_close(moved.poses.spread[j], mine.std(0), rtol=1e-3, atol=1e-6)


def test_a_vae_is_one_capsule_with_the_means_of_the_posteriors(small_vae, images):
    vae, moved = small_vae
    means = vae.posterior(images)[0].detach()
    assert_close(moved.encode(images), means[:, None])
    assert_close(moved.decode(means[:, None]), vae.decode(means))
    training = vae.posterior(data.load("mnist", "train", sample=True)[0][:IMAGES])[0].detach()
    assert_close(moved.poses.mean[0], training.mean(0), rtol=1e-3, atol=1e-5)
    assert_close(moved.poses.spread[0], training.std(0), rtol=1e-3, atol=1e-5)


def test_a_vaes_pose_may_have_any_length_and_its_strip_goes_ten_times_as_far(small_vae):
    vae, moved = small_vae
    state = {"system": "vae", "dataset": "mnist", "capsule": 0, "start": "random", "image": None}
    state |= {"pose": [3.0, -4.0, 0.5], "domain": "complete", "dimension": 1}
    assert shown_pose(state, moved.poses).tolist() == state["pose"]
    poses = strip_poses(state, moved.poses)
    assert_close(poses[:, 1], torch.linspace(-6.5, -1.5, 11))
    assert_close(poses[:, [0, 2]], torch.tensor([[3.0, 0.5]]).expand(11, 2))
    assert_close(strip(state, moved), vae.decode(poses))
    with pytest.raises(ValueError, match="unknown domain 'restricted'; choose one of 'complete'"):
        shown_pose(state | {"domain": "restricted"}, moved.poses)


def test_every_model_has_a_name_of_its_own_and_expert_capsules_that_of_their_data_set():
    names = [name for name, _, _ in movable.models()]
    assert names[:2] == ["mnist", "fashion-mnist"] and "vae-mnist" in names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name, system, dataset", movable.models()[2:])
def test_every_system_that_ships_can_be_moved(name, system, dataset, images):
    """Its test images are rebuilt by the capsule that they turn on, better than by the mean pose of that capsule."""
    moved = movable.CHOICES[system].load(dataset)
    codes = moved.encode(images)
    on = codes.norm(dim=2).argmax(1)
    rebuilt, means = (
        torch.cat([decode_alone(moved, j.item(), each[None]) for j, each in zip(on, poses)])
        for poses in (codes[range(11), on], moved.poses.mean[on])
    )
    assert (rebuilt - images).square().mean() < 0.7 * (means - images).square().mean()
