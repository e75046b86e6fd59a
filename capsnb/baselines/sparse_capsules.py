"""Sparse unsupervised capsules: CapsNet without labels, its capsules masked by their rank.  Rawlinson2018.

Axes: primary capsules i (I of them, e numbers each), latent capsules j (J of them, d numbers each; the paper's L).

Where the paper can be read in two ways:
- Eq. 5 divides by K·J, K being the batch. Then the frequencies of all capsules would sum to 1/J, and nearly all would
  stay below the wanted range; here they sum to 1, as in the authors' code.
- Eq. 4's v' is said to be what classifies, and (section 2.3) masks to affect training alone. ``encode`` gives v',
  ``latent`` gives v, which is what the authors' code hands to its classifier.

Where the authors' code (github.com/Cerenaut/sparse-unsupervised-capsules, commit ecd38f8) departs from their paper, and
we do not: the frequencies aimed at are 0.03 to 0.12, and every latent capsule has a bias, added while routing. Their
running frequency starts from the first batch, of which the paper says nothing; ours starts from 1/J.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsnb import distributed
from capsnb.affine_mnist import MARGIN, SIZE
from capsnb.baselines.capsule_network import PART, CapsuleNetwork, NetworkSettings, squared_error
from capsnb.capsules import squash
from capsnb.checks import require_images
from capsnb.classifier import shift_at_random
from capsnb.pretrained import WEIGHTS, load_network
from capsnb.sparsity import rank, rank_mask, support
from capsnb.training import Step, adam, minimise

SHIPPED = WEIGHTS / "sparse-capsules-mnist.safetensors"


@dataclass(frozen=True)
class SparseCapsulesSettings(NetworkSettings):
    """The network, its mask and its training; what has no comment is the paper's, and before it Sabour2017's.

    The paper trains for 30,000 updates, which are 64 epochs.
    """

    capsules: int = 16
    gamma: float = 12.0  # sharpness of the mask; 0 leaves every capsule as it is: the paper's dense capsules
    cut: float = 0.01  # masks below are 0
    boost_step: float = 0.1  # d
    boost_every: int = 50  # N, updates
    running: float = 0.99  # alpha, memory of the frequencies
    lowest: float = 0.04  # mu_min: a capsule that comes first more seldom is boosted
    highest: float = 0.1  # mu_max: the boost of one that comes first more often is taken back


DENSE = SparseCapsulesSettings(gamma=0.0)
FRAMES = SparseCapsulesSettings(size=SIZE, shift=MARGIN, stride=4, epochs=6.0)  # stride and epochs are ours
DENSE_FRAMES = replace(FRAMES, gamma=0.0)


class Latent(NamedTuple):
    """The latent capsules v, squashed and not masked, and the support ψ of each."""

    capsules: Float[Tensor, "B J d"]
    support: Float[Tensor, "B J"]


class Lifetime(nn.Module):
    """The online lifetime sparsity constraint: how often each capsule comes first, and its boost g.  Section 2.3."""

    def __init__(self, settings: SparseCapsulesSettings):
        super().__init__()
        self.settings = settings
        self.register_buffer("frequency", torch.full((settings.capsules,), 1 / settings.capsules))
        self.register_buffer("boost", torch.ones(settings.capsules))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def score(self, support: Float[Tensor, "B J"]) -> Float[Tensor, "B J"]:
        """What the capsules of an image are ranked by.  Eq. 1."""
        return support * self.boost

    @torch.no_grad()
    def update(self, score: Float[Tensor, "B J"]) -> None:
        """Move the frequencies towards this batch and, at every Nth, the boosts.  Eqs. 5 to 7, algorithm 1."""
        settings = self.settings
        first = distributed.mean((rank(score) == 0).to(self.frequency).mean(0))
        self.frequency.lerp_(first, 1 - settings.running)
        self.updates += 1
        if self.updates % settings.boost_every == 0:
            self.boost += settings.boost_step * (self.frequency < settings.lowest)
            self.boost -= settings.boost_step * (self.frequency > settings.highest)
            self.boost.clamp_(min=1)


class SparseCapsules(CapsuleNetwork):
    """Latent capsules that learn to reconstruct the image, each weighed by how many others draw more support."""

    def __init__(self, settings: SparseCapsulesSettings = SparseCapsulesSettings()):
        super().__init__(settings, settings.capsules)
        self.lifetime = Lifetime(settings)

    def latent_part(self, images: Float[Tensor, "B 1 H W"]) -> Latent:
        """Capsules and support with gradients, of images that are not checked."""
        routed = self.route(images)
        return Latent(squash(routed.z), support(routed.coupling, self.positions))

    def masked(self, latent: Latent) -> Float[Tensor, "B J d"]:
        """v', the capsules times their masks.  Eqs. 1 to 4."""
        mask = rank_mask(self.lifetime.score(latent.support), self.settings.gamma, self.settings.cut)
        return latent.capsules * mask.unsqueeze(2)

    def upper_capsules(self, images: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B J d"]:
        """v', squashed and masked."""
        return self.masked(self.latent_part(images))

    def forward(self, images: Float[Tensor, "B 1 H W"]) -> Float[Tensor, ""]:
        """The training loss: the squared error per image, each moved at random. Training counts who comes first."""
        moved = shift_at_random(images, self.settings.shift)
        latent = self.latent_part(moved)
        found = self.decoder(self.masked(latent)).float()
        if self.training:
            self.lifetime.update(self.lifetime.score(latent.support))
        return squared_error(found, moved).mean()

    @torch.no_grad()
    def latent(self, images: Float[Tensor, "B 1 H W"]) -> Latent:
        """Capsules before any mask, and their support.  Raises ValueError for images outside [0, 1] or another size."""
        require_images(images, self.settings.size)
        return Latent(*map(torch.cat, zip(*map(self.latent_part, images.split(PART)))))


def train_sparse_capsules(
    network: SparseCapsules, images: Float[Tensor, "N 1 H W"], *, seed: int, checkpoint: Path | None = None
) -> Iterator[Step]:
    """Fit ``network`` to images without labels; yield after every update."""
    require_images(images, network.settings.size)
    yield from minimise(network, (images,), adam(network, len(images)), seed=seed, checkpoint=checkpoint)


def load_sparse_capsules(path: Path = SHIPPED) -> SparseCapsules:
    """The network in ``path``, in evaluation mode on the CPU.

    Raises FileNotFoundError, or ValueError for another file.
    """
    return load_network(lambda content: SparseCapsules(SparseCapsulesSettings(**content)), path)
