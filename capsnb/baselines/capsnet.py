"""CapsNet: capsules trained with labels, by routing between two layers of them.  Sabour2017.

Axes: primary capsules i (I of them, e numbers each), one capsule j for each of J classes (d numbers). The squash, the
routing and the images are those of the rest of the library.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from capsnb import checkpoints
from capsnb.capsules import squash, to_capsules
from capsnb.checks import require_images
from capsnb.classifier import shift_at_random
from capsnb.evaluation import CLASSES
from capsnb.pretrained import WEIGHTS
from capsnb.routing import forward_map, route
from capsnb.training import Step, adam, minimise

_PART = 250  # images encoded at once, to bound memory
_FILTER = 9  # pixels across, in both convolutions
SHIPPED = WEIGHTS / "capsnet-mnist.safetensors"
PERTURBATIONS = tuple(round(0.05 * step, 2) for step in range(-5, 6))  # of one number of a capsule; fig. 4


@dataclass(frozen=True)
class CapsNetSettings:
    """The network and its training; what has no comment is the paper's."""

    size: int = 28  # pixels across an image
    channels: int = 256
    types: int = 32  # of primary capsules, at every position
    primary_dim: int = 8
    dim: int = 16
    rounds: int = 3
    first_hidden: int = 512
    second_hidden: int = 1024
    present: float = 0.9  # m+: the capsule of a class that is there should be at least this long
    absent: float = 0.1  # m-: that of a class that is not there at most this long
    absent_weight: float = 0.5
    reconstruction_weight: float = 0.0005
    shift: int = 2  # pixels by which training images are moved at most, each way
    initial_deviation: float = 0.1  # ours, of W
    epochs: float = 15.0  # ours: about two hours of a processor core
    batch: int = 128
    learning_rate: float = 1e-3  # Adam's usual one; ours, for the paper's unnamed decay: warmed up, decayed to 0


class CapsNet(nn.Module):
    """Two convolutions to primary capsules, routing to one capsule a class, and a decoder of the class's capsule."""

    def __init__(self, settings: CapsNetSettings = CapsNetSettings()):
        super().__init__()
        self.settings, primary = settings, settings.types * settings.primary_dim
        first = nn.Conv2d(1, settings.channels, _FILTER)
        second = nn.Conv2d(settings.channels, primary, _FILTER, stride=2)
        self.convolutions = nn.Sequential(first, nn.ReLU(), second).to(memory_format=torch.channels_last)
        across = (settings.size - 2 * _FILTER + 1) // 2 + 1
        shape = across**2 * settings.types, CLASSES, settings.dim, settings.primary_dim
        self.W = nn.Parameter(settings.initial_deviation * torch.randn(shape))
        self.decoder = decoder(settings)

    def lower_capsules(self, images: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B I e"]:
        """The primary capsules, squashed."""
        return squash(to_capsules(self.convolutions(images).float(), self.settings.primary_dim))

    def upper_capsules(self, images: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B J d"]:
        """One capsule for each class, squashed."""
        return route_to_classes(self.lower_capsules(images), self.W, self.settings.rounds)

    def forward(self, images: Float[Tensor, "B 1 H W"], labels: Float[Tensor, "B"]) -> Float[Tensor, ""]:
        """The training loss per image: margin loss and weighted reconstruction, of the images, each moved at random."""
        moved, labels = shift_at_random(images, self.settings.shift), labels.long()
        capsules = self.upper_capsules(moved)
        squares = squared_error(self.decoder(mask(capsules, labels)).float(), moved)
        margins = margin_loss(class_lengths(capsules), F.one_hot(labels, CLASSES).bool(), self.settings)
        return (margins + self.settings.reconstruction_weight * squares).mean()

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B J d"]:
        """One capsule for each class.  Raises ValueError for images outside [0, 1] or of another size."""
        require_images(images, self.settings.size)
        return torch.cat([self.upper_capsules(part) for part in images.split(_PART)])

    @torch.no_grad()
    def decode(self, capsules: Float[Tensor, "B J d"]) -> Float[Tensor, "B 1 H W"]:
        """Images in [0, 1] of capsules, none of them masked."""
        return self.decoder(capsules)

    def reconstruct(
        self, capsules: Float[Tensor, "B J d"], classes: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B 1 H W"]:
        """What the capsule of one class says of every image; without ``classes``, the longest capsule."""
        return self.decode(mask(capsules, winners(capsules) if classes is None else classes))

    def perturb(
        self, capsules: Float[Tensor, "B J d"], number: int, amounts: tuple[float, ...] = PERTURBATIONS
    ) -> Float[Tensor, "B amounts 1 H W"]:
        """Reconstructions by the longest capsule with ``amounts`` added to one of its numbers.  Sabour2017, fig. 4."""
        found = winners(capsules)
        return torch.stack([self.reconstruct(added(capsules, number, amount), found) for amount in amounts], dim=1)


def route_to_classes(
    x: Float[Tensor, "B I e"], W: Float[Tensor, "I J d e"], rounds: int
) -> Float[Tensor, "B J d"]:
    """A softmax over the classes, agreement by scalar product; squashed.  Sabour2017, procedure 1.

    The gradient takes the couplings as constants and so goes through the last round alone; the paper leaves this open.
    """
    with torch.autocast(x.device.type, enabled=False):
        with torch.no_grad():
            coupling = route(x, W, rounds=rounds, over="upper", agreement="inner").coupling
        return squash(forward_map(x, W, coupling))


def class_lengths(capsules: Float[Tensor, "B J d"]) -> Float[Tensor, "B J"]:
    """How surely every class is there, in [0, 1): the length of its capsule."""
    return torch.linalg.vector_norm(capsules, dim=2)


def winners(capsules: Float[Tensor, "B J d"]) -> Int[Tensor, "B"]:
    """The class of the longest capsule of every image."""
    return class_lengths(capsules).argmax(1)


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


def squared_error(found: Float[Tensor, "B 1 H W"], images: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B"]:
    """The sum over the pixels of every image."""
    return (found - images).square().sum((1, 2, 3))


def decoder(settings: CapsNetSettings) -> nn.Sequential:
    """Three fully connected layers from the capsules to the pixels.  Sabour2017, fig. 2."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(CLASSES * settings.dim, settings.first_hidden),
        nn.ReLU(),
        nn.Linear(settings.first_hidden, settings.second_hidden),
        nn.ReLU(),
        nn.Linear(settings.second_hidden, settings.size**2),
        nn.Sigmoid(),
        nn.Unflatten(1, (1, settings.size, settings.size)),
    )


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
    tensors, facts = checkpoints.read(path)
    capsnet = CapsNet(CapsNetSettings(**facts["settings"]))
    capsnet.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return capsnet.eval()
