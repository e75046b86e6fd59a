"""The simplest model of pictures: a Gaussian in the leading principal components of the pixels."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from torch import Tensor

from capsnb.checks import require_images


class PixelGaussian(NamedTuple):
    """The mean image, the principal directions of length 1, and the deviation along each."""

    mean: Float[Tensor, "pixels"]
    directions: Float[Tensor, "components pixels"]
    deviation: Float[Tensor, "components"]

    def sample(self, count: int, *, rng: torch.Generator) -> Float[Tensor, "count 1 28 28"]:
        """Images of ``count`` draws, cut to [0, 1]."""
        noise = torch.randn(count, len(self.deviation), generator=rng)
        return (self.mean + noise * self.deviation @ self.directions).clamp(0, 1).view(count, 1, 28, 28)


def fit_pixel_gaussian(images: Float[Tensor, "N 1 28 28"], components: int) -> PixelGaussian:
    """The Gaussian of the first ``components`` principal components of ``images``.

    Raises ValueError for more components than images or pixels, and for images outside [0, 1].
    """
    require_images(images)
    fitted = PCA(components, random_state=0).fit(images.flatten(1).numpy())
    parts = (fitted.mean_, fitted.components_, fitted.explained_variance_**0.5)
    return PixelGaussian(*(torch.as_tensor(part, dtype=torch.float32) for part in parts))
