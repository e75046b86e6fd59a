"""What the explorer shows, as functions of a small dictionary: state to pose, pose to pictures.

``capsnb.widgets`` puts sliders in front of it.
"""

import io
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torchvision import datasets

from capsnb.baselines.capsnet import PERTURBATIONS
from capsnb.checks import require_choice
from capsnb.movable import Model
from capsnb.plots import tile
from capsnb.sampling import Poses, restrict

CLASSES = {
    "mnist": [str(digit) for digit in range(10)],
    "fashion-mnist": [name.lower() for name in datasets.FashionMNIST.classes],
}
DOMAINS = ("complete", "restricted")
OFFSETS = list(PERTURBATIONS)  # how far one dimension is moved
LONGEST = 1 - 1e-6  # a squashed capsule is shorter than 1


class State(TypedDict):
    """Everything that decides what the explorer shows: small, and JSON as it stands."""

    system: str  # one of ``capsnb.movable.CHOICES``
    dataset: str
    capsule: int
    start: str  # where the pose began: "real", "random" or "mean"; "waiting" for a model that was just chosen
    image: int | None  # the shipped test image that it began with, if any
    pose: list[float]  # where the sliders stand
    domain: str  # "complete" or "restricted"
    dimension: int  # which one the strip moves


def shown_pose(state: State, poses: Poses) -> Float[Tensor, " d"]:
    """The pose that is decoded: the sliders', turned if the domain is restricted; capsules are shortened to below 1.

    Raises ValueError for a capsule, dimension, domain or pose that the model does not have.
    """
    capsules, dim = poses.mean.shape
    require_choice(state["domain"], DOMAINS if poses.bounded else DOMAINS[:1], "domain")
    for name, count in (("capsule", capsules), ("dimension", dim)):
        require_number(state[name], count, name)
    if len(state["pose"]) != dim or not np.isfinite(state["pose"]).all():
        raise ValueError(f"the pose is {state['pose']}; expected {dim} finite numbers")
    return _allowed(torch.tensor(state["pose"])[None], state, poses)[0]


def require_number(value: int, count: int, name: str) -> None:
    """Raise ValueError unless ``value`` is one of the first ``count`` numbers."""
    if value not in range(count):
        raise ValueError(f"there is no {name} {value!r}; choose a number from 0 to {count - 1}")


def strip_poses(state: State, poses: Poses) -> Float[Tensor, "11 d"]:
    """The shown pose with one dimension moved in even steps through the poses' reach; the sixth is the pose itself."""
    moved = shown_pose(state, poses).repeat(len(OFFSETS), 1)
    moved[:, state["dimension"]] += torch.tensor(OFFSETS) * (poses.reach / OFFSETS[-1])
    return _allowed(moved, state, poses)


def strip(state: State, model: Model) -> Float[Tensor, "11 1 28 28"]:
    """The images of ``strip_poses``; the sixth is the picture that the explorer shows."""
    return decode_alone(model, state["capsule"], strip_poses(state, model.poses))


def decode_alone(model: Model, capsule: int, poses: Float[Tensor, "B d"]) -> Float[Tensor, "B 1 28 28"]:
    """Images of ``poses`` of one capsule, with all others zero.  Section 4.2."""
    layer = poses.new_zeros(len(poses), *model.poses.mean.shape)
    layer[:, capsule] = poses
    return model.decode(layer)


def shorten(pose: Float[Tensor, "*axes d"]) -> Float[Tensor, "*axes d"]:
    """Scale poses longer than a squashed capsule can be to length 1 - 1e-6; leave the others as they are."""
    length = torch.linalg.vector_norm(pose, dim=-1, keepdim=True)
    return torch.where(length > LONGEST, pose * (LONGEST / length.clamp(min=LONGEST)), pose)


def _allowed(pose: Float[Tensor, "B d"], state: State, poses: Poses) -> Float[Tensor, "B d"]:
    if state["domain"] == "restricted":
        pose = restrict(pose[:, None], poses.mean[[state["capsule"]]])[:, 0]
    return shorten(pose) if poses.bounded else pose


def png(images: Float[Tensor, "*rows count 1 28 28"], scale: int, *, gap: int = 0, mark: int | None = None) -> bytes:
    """A PNG of rows of images, each pixel a square of side ``scale``; ``mark`` frames one column in orange."""
    grid = images if images.ndim == 5 else images[None]
    grey = (tile(grid, gap) * 255).round().astype(np.uint8)
    canvas = np.stack([grey] * 3, axis=2)
    if mark is not None:
        left = mark * (28 + gap)
        framed = canvas[:, left : left + 28 + 2 * gap]
        inside = framed[gap:-gap, gap:-gap].copy()
        framed[:] = (230, 159, 0)
        framed[gap:-gap, gap:-gap] = inside
    large, file = canvas.repeat(scale, axis=0).repeat(scale, axis=1), io.BytesIO()
    Image.fromarray(large).save(file, "png")
    return file.getvalue()
