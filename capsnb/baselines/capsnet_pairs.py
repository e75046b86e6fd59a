"""CapsNet for two digits in one image, each read and reconstructed on its own.  Sabour2017, section 6.

Axes as in capsnet.py; the images are pairs of multi_mnist.py, 36 pixels across.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from capsnb.baselines.capsnet import CapsNet, CapsNetSettings, class_lengths, margin_loss, mask
from capsnb.baselines.capsule_network import squared_error
from capsnb.checks import require_images
from capsnb.evaluation import CLASSES
from capsnb.multi_mnist import SIZE, draw_pairs
from capsnb.training import Step, adam, minimise

# Epochs and batch are ours: 60,000 pairs, about 20 minutes of a processor core (the paper made 60 million), in small
# batches, which make more updates of them. The digits of a pair are moved where it is made, so the image is not.
PAIRS = CapsNetSettings(size=SIZE, shift=0, epochs=1.0, batch=32)


class PairsCapsNet(CapsNet):
    """A CapsNet that learns from pairs of digits, one over the other, made anew for every update."""

    def __init__(self, settings: CapsNetSettings = PAIRS):
        super().__init__(settings)

    def forward(self, images: Float[Tensor, "B 1 28 28"], labels: Float[Tensor, "B"]) -> Float[Tensor, ""]:
        """The training loss per pair, of as many pairs as there are images, drawn among these.

        The margin loss with both classes there, and the weighted squares by which the capsule of either class fails to
        reconstruct its digit alone.
        """
        pairs = draw_pairs(images, labels.long(), len(images), rng=torch.default_generator)
        capsules = self.upper_capsules(pairs.images)
        margins = margin_loss(class_lengths(capsules), F.one_hot(pairs.labels, CLASSES).sum(1).bool(), self.settings)
        squares = sum(
            squared_error(self.decoder(mask(capsules, classes)).float(), alone)
            for classes, alone in zip(pairs.labels.unbind(1), pairs.digits.unbind(1))
        )
        return (margins + self.settings.reconstruction_weight * squares).mean()

    def reconstruct_each(
        self, capsules: Float[Tensor, "B J d"], classes: Int[Tensor, "B n"]
    ) -> Float[Tensor, "B n 1 H W"]:
        """What the capsules of n classes say of every image, each alone."""
        return torch.stack([self.reconstruct(capsules, one) for one in classes.unbind(1)], dim=1)


def longest(capsules: Float[Tensor, "B J d"], count: int) -> Int[Tensor, "B count"]:
    """The classes of the ``count`` longest capsules of every image, the longest first."""
    return class_lengths(capsules).topk(count).indices


def start_from(network: PairsCapsNet, trained: CapsNet) -> None:
    """Take over the convolutions of a CapsNet trained on single digits, which read images of any size."""
    network.convolutions.load_state_dict(trained.convolutions.state_dict())


def train_on_pairs(
    network: PairsCapsNet,
    images: Float[Tensor, "N 1 28 28"],
    labels: Int[Tensor, "N"],
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Step]:
    """Fit ``network`` to pairs of the digits in ``images``; yield after every update."""
    require_images(images)
    yield from minimise(network, (images, labels), adam(network, len(images)), seed=seed, checkpoint=checkpoint)
