"""The network that CapsNet and the sparse unsupervised capsules share.  Sabour2017, figs. 1 and 2.

Two convolutions to primary capsules i (I of them, e numbers each), routing to upper capsules j (J of them, d numbers
each), and a decoder of fully connected layers. The squash, the routing and the images are those of the rest of the
library.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsnb.capsules import squash, to_capsules
from capsnb.checks import require_images
from capsnb.routing import Routing, forward_map, route

PART = 250  # images encoded at once, to bound memory
_FILTER = 9  # pixels across, in both convolutions
LARGEST = ("convolutions.2.weight",)  # most of the parameters: their file holds them in 8 bits


@dataclass(frozen=True)
class NetworkSettings:
    """The network and its training; what has no comment is Sabour2017's."""

    size: int = 28  # pixels across an image
    stride: int = 2  # of the second convolution
    channels: int = 256
    types: int = 32  # of primary capsules, at every position
    primary_dim: int = 8
    dim: int = 16
    rounds: int = 3
    first_hidden: int = 512
    second_hidden: int = 1024
    shift: int = 2  # pixels by which training images are moved at most, each way
    initial_deviation: float = 0.1  # ours, of W
    epochs: float = 15.0  # ours: about two hours of a processor core
    batch: int = 128
    learning_rate: float = 1e-3  # Adam's usual one; ours, for the paper's unnamed decay: warmed up, decayed to 0


class CapsuleNetwork(nn.Module):
    """Two convolutions to primary capsules, routing to ``capsules`` upper ones, and a decoder of them."""

    def __init__(self, settings: NetworkSettings, capsules: int):
        super().__init__()
        self.settings, primary = settings, settings.types * settings.primary_dim
        first = nn.Conv2d(1, settings.channels, _FILTER)
        second = nn.Conv2d(settings.channels, primary, _FILTER, stride=settings.stride)
        self.convolutions = nn.Sequential(first, nn.ReLU(), second).to(memory_format=torch.channels_last)
        self.positions = ((settings.size - 2 * _FILTER + 1) // settings.stride + 1) ** 2  # of primary capsules
        shape = self.positions * settings.types, capsules, settings.dim, settings.primary_dim
        self.W = nn.Parameter(settings.initial_deviation * torch.randn(shape))
        self.decoder = decoder(capsules, settings)

    def lower_capsules(self, images: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B I e"]:
        """The primary capsules, squashed; those of one position are neighbours."""
        return squash(to_capsules(self.convolutions(images).float(), self.settings.primary_dim))

    def route(self, images: Float[Tensor, "B 1 H W"]) -> Routing:
        """The couplings of the primary capsules, and the upper capsules before the squash."""
        return route_with_gradient(self.lower_capsules(images), self.W, self.settings.rounds)

    def upper_capsules(self, images: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B J d"]:
        """The upper capsules, squashed."""
        return squash(self.route(images).z)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B J d"]:
        """The upper capsules.  Raises ValueError for images outside [0, 1] or of another size."""
        require_images(images, self.settings.size)
        return torch.cat([self.upper_capsules(part) for part in images.split(PART)])

    @torch.no_grad()
    def decode(self, capsules: Float[Tensor, "B J d"]) -> Float[Tensor, "B 1 H W"]:
        """Images in [0, 1] of capsules as they are: none of them is masked here."""
        return self.decoder(capsules)


def route_with_gradient(x: Float[Tensor, "B I e"], W: Float[Tensor, "I J d e"], rounds: int) -> Routing:
    """A softmax over the upper capsules, agreement by scalar product.  Sabour2017, procedure 1.

    The gradient takes the couplings as constants and so goes through the last round alone; the paper leaves this open.
    """
    with torch.autocast(x.device.type, enabled=False):
        with torch.no_grad():
            coupling = route(x, W, rounds=rounds, over="upper", agreement="inner").coupling
        return Routing(coupling, forward_map(x, W, coupling))


def squared_error(found: Float[Tensor, "B 1 H W"], images: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B"]:
    """The sum over the pixels of every image."""
    return (found - images).square().sum((1, 2, 3))


def decoder(capsules: int, settings: NetworkSettings) -> nn.Sequential:
    """Three fully connected layers from the capsules to the pixels.  Sabour2017, fig. 2."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(capsules * settings.dim, settings.first_hidden),
        nn.ReLU(),
        nn.Linear(settings.first_hidden, settings.second_hidden),
        nn.ReLU(),
        nn.Linear(settings.second_hidden, settings.size**2),
        nn.Sigmoid(),
        nn.Unflatten(1, (1, settings.size, settings.size)),
    )
