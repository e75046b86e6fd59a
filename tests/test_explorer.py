"""What the explorer shows, without any widget."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from capsnb.explorer import OFFSETS, decode_alone, png, shorten, shown_pose, strip, strip_poses

J, D = 5, 7


@pytest.fixture(autouse=True)
def mean_poses(small_model, rng):
    """Every capsule has a mean pose, also one that wins nothing."""
    small_model.poses.mean.copy_(0.8 * torch.nn.functional.normalize(torch.randn(J, D, generator=rng)))


@pytest.fixture
def state(rng):
    """Capsule 3 at a short pose, so that no offset of the strip makes it too long."""
    pose = (0.2 * torch.randn(D, generator=rng)).tolist()
    return {"dataset": "mnist", "capsule": 3, "start": "random", "image": None, "pose": pose} | {
        "domain": "complete",
        "dimension": 2,
    }


def test_in_the_complete_domain_a_pose_shorter_than_1_is_shown_as_it_is(state, small_model):
    assert shown_pose(state, small_model.poses).tolist() == torch.tensor(state["pose"]).tolist()


def test_a_pose_that_is_too_long_keeps_its_direction_and_is_shortened_below_1():
    poses = torch.tensor([[3.0, -4.0], [0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])
    assert_close(shorten(poses), torch.tensor([[0.6, -0.8], [0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    assert torch.linalg.vector_norm(shorten(1e3 * poses), dim=1).max() < 1


def test_the_restricted_domain_turns_a_pose_that_points_away_from_the_mean_and_no_other(state, small_model):
    mean = small_model.poses.mean[3]
    for sign in (1, -1):
        state |= {"pose": (0.5 * sign * mean).tolist(), "domain": "restricted"}
        assert_close(shown_pose(state, small_model.poses), 0.5 * mean)
        assert_close(shown_pose(state | {"domain": "complete"}, small_model.poses), 0.5 * sign * mean)


def test_the_strip_moves_one_dimension_from_a_quarter_below_to_a_quarter_above(state, small_model):
    moved = strip_poses(state, small_model.poses) - torch.tensor(state["pose"])
    expected = [-0.25, -0.2, -0.15, -0.1, -0.05, 0, 0.05, 0.1, 0.15, 0.2, 0.25]
    assert OFFSETS == expected
    assert_close(moved[:, 2], torch.tensor(expected))
    assert_close(moved[:, [0, 1, 3, 4, 5, 6]], torch.zeros(11, 6))


@pytest.mark.parametrize("domain", ["complete", "restricted"])
@pytest.mark.parametrize("length", [0.1, 5.0])
def test_the_strip_has_11_images_of_allowed_poses_and_the_middle_one_is_the_current(state, small_model, domain, length):
    state |= {"domain": domain, "pose": (-length * small_model.poses.mean[3]).tolist()}
    poses, images = strip_poses(state, small_model.poses), strip(state, small_model)
    shown = shown_pose(state, small_model.poses)
    assert len(images) == 11
    assert_close(poses[5], shown)
    assert_close(images[5:6], decode_alone(small_model, 3, shown[None]), rtol=1e-4, atol=1e-5)
    assert torch.linalg.vector_norm(poses, dim=1).max() < 1
    if domain == "restricted":
        assert (poses @ small_model.poses.mean[3]).min() >= 0


def test_one_capsule_is_decoded_with_all_others_at_zero(small_model, rng):
    poses = 0.3 * torch.randn(3, D, generator=rng)
    for b in range(3):
        layer = torch.zeros(1, J, D)
        layer[0, 4] = poses[b]
        assert_close(decode_alone(small_model, 4, poses)[b], small_model.decode(layer)[0], rtol=1e-4, atol=1e-5)


def test_the_picture_follows_from_the_state_after_a_trip_through_json(state, small_model):
    assert torch.equal(strip(json.loads(json.dumps(state)), small_model), strip(state, small_model))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"capsule": J}, "there is no capsule 5; choose a number from 0 to 4"),
        ({"capsule": -1}, "there is no capsule -1"),
        ({"dimension": D}, "there is no dimension 7; choose a number from 0 to 6"),
        ({"domain": "half"}, "unknown domain 'half'; choose one of 'complete', 'restricted'"),
        ({"pose": [0.1] * 16}, "expected 7 finite numbers"),
        ({"pose": [float("nan")] * D}, "expected 7 finite numbers"),
    ],
)
def test_a_state_that_the_model_cannot_show_is_refused(state, small_model, change, message):
    with pytest.raises(ValueError, match=message):
        shown_pose(state | change, small_model.poses)


def test_the_png_holds_every_pixel_as_a_square_and_frames_the_marked_image(rng):
    images = torch.rand(3, 1, 28, 28, generator=rng)
    canvas = np.asarray(Image.open(io.BytesIO(png(images, 3, gap=2, mark=1))))
    assert canvas.shape == (3 * 32, 3 * (2 + 3 * 30), 3)
    orange = (canvas == (230, 159, 0)).all(2)
    assert orange.sum() == 9 * (32 * 32 - 28 * 28)
    for k in range(3):
        left = 3 * (2 + 30 * k)
        square = canvas[6 : 6 + 84, left : left + 84]
        for row, column in ((0, 0), (1, 2), (2, 1)):
            grey = (images[k, 0].numpy() * 255).round().astype(np.uint8)
            assert (square[row::3, column::3] == grey[..., None]).all()


def test_the_png_of_a_grid_holds_its_rows_one_below_the_other(rng):
    images = torch.rand(2, 3, 1, 28, 28, generator=rng)
    canvas = np.asarray(Image.open(io.BytesIO(png(images, 1))))
    rows = [np.asarray(Image.open(io.BytesIO(png(row, 1)))) for row in images]
    assert (canvas == np.concatenate(rows)).all()
