"""CapsNet: capsules trained with labels, by routing between two layers of them.  Sabour2017.

Axes: primary capsules i (I of them, e numbers each), one capsule j for each of J classes (d numbers).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from capsnb.baselines.capsule_network import CapsuleNetwork, NetworkSettings, squared_error
from capsnb.checks import require_images
from capsnb.classifier import shift_at_random
from capsnb.evaluation import CLASSES, winner
from capsnb.pretrained import WEIGHTS, load_network
from capsnb.training import Step, adam, minimise

SHIPPED = WEIGHTS / "capsnet-mnist.safetensors"
PERTURBATIONS = tuple(round(0.05 * step, 2) for step in range(-5, 6))  # of one number of a capsule; fig. 4


@dataclass(frozen=True)
class CapsNetSettings(NetworkSettings):
    """The network and its training with labels; what has no comment is the paper's."""

    present: float = 0.9  # m+: the capsule of a class that is there should be at least this long
    absent: float = 0.1  # m-: that of a class that is not there at most this long
    absent_weight: float = 0.5
    reconstruction_weight: float = 0.0005


class CapsNet(CapsuleNetwork):
    """One upper capsule a class, and a decoder of the class's capsule."""

    def __init__(self, settings: CapsNetSettings = CapsNetSettings()):
        super().__init__(settings, CLASSES)

    def forward(self, images: Float[Tensor, "B 1 H W"], labels: Float[Tensor, "B"]) -> Float[Tensor, ""]:
        """The training loss per image: margin loss and weighted reconstruction, of the images, each moved at random."""
        moved, labels = shift_at_random(images, self.settings.shift), labels.long()
        capsules = self.upper_capsules(moved)
        squares = squared_error(self.decoder(mask(capsules, labels)).float(), moved)
        margins = margin_loss(class_lengths(capsules), F.one_hot(labels, CLASSES).bool(), self.settings)
        return (margins + self.settings.reconstruction_weight * squares).mean()

    def reconstruct(
        self, capsules: Float[Tensor, "B J d"], classes: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B 1 H W"]:
        """What the capsule of one class says of every image; without ``classes``, the longest capsule."""
        return self.decode(mask(capsules, winner(capsules) if classes is None else classes))

    def perturb(
        self, capsules: Float[Tensor, "B J d"], number: int, amounts: tuple[float, ...] = PERTURBATIONS
    ) -> Float[Tensor, "B amounts 1 H W"]:
        """Reconstructions by the longest capsule with ``amounts`` added to one of its numbers.  Sabour2017, fig. 4."""
        found = winner(capsules)
        return torch.stack([self.reconstruct(added(capsules, number, amount), found) for amount in amounts], dim=1)


def class_lengths(capsules: Float[Tensor, "B J d"]) -> Float[Tensor, "B J"]:
    """How surely every class is there, in [0, 1): the length of its capsule."""
    return torch.linalg.vector_norm(capsules, dim=2)


def mask(capsules: Float[Tensor, "B J d"], classes: Int[Tensor, "B"]) -> Float[Tensor, "B J d"]:
    """The capsules with all but that of the image's class set to 0."""
    return capsules * F.one_hot(classes, capsules.shape[1]).to(capsules).unsqueeze(2)


def added(capsules: Float[Tensor, "B J d"], number: int, amount: float) -> Float[Tensor, "B J d"]:
    """The capsules with ``amount`` added to the given one of the d numbers of each."""
    changed = capsules.clone()
    changed[..., number] += amount
    return changed


def margin_loss(
    lengths: Float[Tensor, "B J"], there: Bool[Tensor, "B J"], settings: CapsNetSettings
) -> Float[Tensor, "B"]:
    """The squares of what present classes' capsules lack in length, and others have too much.  Sabour2017, eq. 4."""
    short = (settings.present - lengths).relu().square()
    long = (lengths - settings.absent).relu().square()
    return torch.where(there, short, settings.absent_weight * long).sum(1)


def train_capsnet(
    capsnet: CapsNet,
    images: Float[Tensor, "N 1 H W"],
    labels: Int[Tensor, "N"],
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Step]:
    """Fit ``capsnet`` to labelled images; yield after every update."""
    require_images(images, capsnet.settings.size)
    yield from minimise(capsnet, (images, labels), adam(capsnet, len(images)), seed=seed, checkpoint=checkpoint)


def load_capsnet(path: Path = SHIPPED) -> CapsNet:
    """The CapsNet in ``path``, in evaluation mode on the CPU.

    Raises FileNotFoundError, or ValueError for another file.
    """
    return load_network(lambda content: CapsNet(CapsNetSettings(**content)), path)
