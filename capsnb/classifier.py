"""A small classifier of images: its features are the space in which samples are compared with real images.

It learns from the labels of the training images. No capsule, and no other model that makes images, ever sees one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from capsnb.checks import require_choice, require_images
from capsnb.evaluation import CLASSES
from capsnb.pretrained import WEIGHTS, load_network
from capsnb.training import Step, adam, minimise

CLASSIFIERS = ("mnist",)
_PART = 1000  # images classified at once, to bound memory


@dataclass(frozen=True)
class ClassifierSettings:
    """The classifier and its training; all values are ours."""

    first_channels: int = 32
    channels: int = 64  # of the other two convolutions
    features: int = 64  # few, so that 10,000 images tell their covariance well
    shift: int = 2  # pixels by which training images are moved at most, each way
    epochs: float = 6.0
    batch: int = 128
    learning_rate: float = 2e-3  # Adam, warmed up and decayed to 0


class Classifier(nn.Module):
    """Three convolutions with batch normalisation and pooling, 28 -> 14 -> 7 -> 3, then 64 features and 10 classes."""

    def __init__(self, settings: ClassifierSettings = ClassifierSettings()):
        super().__init__()
        self.settings, first, last = settings, settings.first_channels, settings.channels
        self.convolutions = nn.Sequential(*_block(1, first, 5), *_block(first, last, 3), *_block(last, last, 3))
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(9 * last, settings.features), nn.ReLU())
        self.output = nn.Linear(settings.features, CLASSES)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Float[Tensor, "B 1 28 28"], labels: Float[Tensor, "B"]) -> Float[Tensor, ""]:
        """The training loss: cross-entropy in nats of the images, each moved at random."""
        moved = shift_at_random(images, self.settings.shift)
        logits = self.output(self.hidden(self.convolutions(moved)))
        return F.cross_entropy(logits.float(), labels.long())

    @torch.no_grad()
    def features(self, images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, "B features"]:
        """The last layer before the classes.  Raises ValueError for images outside [0, 1] or of another size."""
        require_images(images)
        return torch.cat([self.hidden(self.convolutions(part)) for part in images.split(_PART)])

    @torch.no_grad()
    def probabilities(self, images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, "B 10"]:
        """The probability of every class.  Raises ValueError for images outside [0, 1] or of another size."""
        return self.classify(self.features(images))

    @torch.no_grad()
    def classify(self, features: Float[Tensor, "B features"]) -> Float[Tensor, "B 10"]:
        """The probability of every class, from what ``features`` gave."""
        return self.output(features).softmax(1)


def shift_at_random(
    images: Float[Tensor, "B 1 H W"], most: int, *, rng: torch.Generator | None = None
) -> Float[Tensor, "B 1 H W"]:
    """Every image moved by up to ``most`` pixels down or up and right or left, zeros coming in from outside.

    Without ``rng`` the moves come from torch's global generator, which training seeds anew for every update.
    """
    windows = F.pad(images, [most] * 4).unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
    down, right = torch.randint(2 * most + 1, (2, len(images)), generator=rng)
    return windows[torch.arange(len(images)), :, down, right]


def train_classifier(
    classifier: Classifier,
    images: Float[Tensor, "N 1 28 28"],
    labels: Int[Tensor, "N"],
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Step]:
    """Fit ``classifier`` to labelled images; yield after every update."""
    require_images(images)
    yield from minimise(classifier, (images, labels), adam(classifier, len(images)), seed=seed, checkpoint=checkpoint)


def load_classifier(dataset: str = "mnist") -> Classifier:
    """The trained classifier of ``dataset`` that ships with capsnb, on the CPU.  Raises ValueError for another name."""
    require_choice(dataset, CLASSIFIERS, "data set with a classifier")
    path = WEIGHTS / f"classifier-{dataset}.safetensors"
    return load_network(lambda content: Classifier(ClassifierSettings(**content)), path)


def _block(inputs: int, outputs: int, size: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)
