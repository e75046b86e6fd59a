"""The variational autoencoder, around the convolutions of stage 1.  KingmaWelling2014."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from capsnb.checks import require_images
from capsnb.model import GRID, ConvAutoencoder
from capsnb.pretrained import WEIGHTS, load_network
from capsnb.settings import AutoencoderSettings
from capsnb.training import Step, adam, minimise

_PART = 250  # images encoded or decoded at once, to bound memory
SHIPPED = WEIGHTS / "vae-mnist.safetensors"


@dataclass(frozen=True)
class VAESettings:
    """The VAE and its training."""

    latent: int = 16  # what one capsule has
    channels: int = 128  # those of stage 1
    epochs: float = 3.0  # this and the rest: those of stage 1, Adam, warmed up and decayed to 0
    batch: int = 128
    learning_rate: float = 2e-3


class VAE(nn.Module):
    """Stage 1's two 9 x 9 filter banks and their transposes, with a Gaussian of ``latent`` numbers in between.

    One linear map leads from the features at 6 x 6 positions to the Gaussian's mean and log variance, another from
    ``latent`` numbers back to features.
    """

    def __init__(self, settings: VAESettings = VAESettings()):
        super().__init__()
        self.settings = settings
        self.convolutions = ConvAutoencoder(AutoencoderSettings(channels=settings.channels))
        numbers = settings.channels * GRID[0] * GRID[1]
        self.to_latent = nn.Linear(numbers, 2 * settings.latent)
        self.from_latent = nn.Linear(settings.latent, numbers)

    def posterior(
        self, images: Float[Tensor, "B 1 28 28"]
    ) -> tuple[Float[Tensor, "B latent"], Float[Tensor, "B latent"]]:
        """Mean and log variance of the latent numbers given every image."""
        return self.to_latent(self.convolutions.encode(images).flatten(1)).float().chunk(2, dim=1)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, "B latent"]:
        """The means of the posteriors."""
        return torch.cat([self.posterior(part)[0] for part in images.split(_PART)])

    def decode_logits(self, latent: Float[Tensor, "B latent"]) -> Float[Tensor, "B 1 28 28"]:
        """The image before the sigmoid."""
        features = F.leaky_relu(self.from_latent(latent), self.convolutions.settings.slope)
        return self.convolutions.decode_logits(features.unflatten(1, (self.settings.channels, *GRID))).float()

    def bound(
        self, images: Float[Tensor, "B 1 28 28"], noise: Float[Tensor, "B latent"]
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
        """Cross-entropy of every image's pixels and divergence from N(0, 1), in nats; their sum is minus the ELBO."""
        mean, log_variance = self.posterior(images)
        logits = self.decode_logits(mean + (log_variance / 2).exp() * noise)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, images, reduction="none").sum((1, 2, 3))
        return cross_entropy, divergence(mean, log_variance).sum(1)

    def forward(self, images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, ""]:
        """Minus the ELBO per image, in nats, with noise from torch's global generator."""
        return sum(self.bound(images, torch.randn(len(images), self.settings.latent).to(images))).mean()

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "B latent"]) -> Float[Tensor, "B 1 28 28"]:
        """Images in [0, 1]: the probability of every pixel, not a draw."""
        return torch.cat([self.decode_logits(part).sigmoid() for part in latent.split(_PART)])

    def sample(self, count: int, *, rng: torch.Generator) -> Float[Tensor, "count 1 28 28"]:
        """Images of ``count`` draws from N(0, 1)."""
        return self.decode(torch.randn(count, self.settings.latent, generator=rng))


def divergence(
    mean: Float[Tensor, "B latent"], log_variance: Float[Tensor, "B latent"]
) -> Float[Tensor, "B latent"]:
    """The divergence of every latent number's Gaussian from N(0, 1), in nats."""
    return (mean.square() + log_variance.exp() - 1 - log_variance) / 2


def train_vae(
    vae: VAE, images: Float[Tensor, "N 1 28 28"], *, seed: int, checkpoint: Path | None = None
) -> Iterator[Step]:
    """Maximise the ELBO of ``images``; yield after every update."""
    require_images(images)
    yield from minimise(vae, (images,), adam(vae, len(images)), seed=seed, checkpoint=checkpoint)


def load_vae(path: Path = SHIPPED) -> VAE:
    """The VAE in ``path``, in evaluation mode on the CPU.

    Raises FileNotFoundError, or ValueError for another file.
    """
    return load_network(lambda content: VAE(VAESettings(**content)), path)
