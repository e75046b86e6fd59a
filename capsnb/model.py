"""The trained parts, one nn.Module a stage, and the whole model.

Every stage's ``forward`` is its training loss, so that any optimiser and any data-parallel wrapper can train it.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from capsnb.capsules import from_capsules, squash, to_capsules
from capsnb.checks import require_finite, require_floats, require_images, require_shape
from capsnb.mixing import contrastive_divergence
from capsnb.routing import Routing, RoutingState, forward_map, reverse_map, route, route_with_agreement
from capsnb.sampling import Poses
from capsnb.settings import AutoencoderSettings, DecoderSettings, EncoderSettings, Settings
from capsnb.sparsity import Sparsity, explanation, share_out

GRID = (6, 6)  # positions of the feature map


class ConvAutoencoder(nn.Module):
    """Stage 1: two 9 x 9 filter banks and their transposes, 28 -> 20 -> 6 and back.  Section 4.1.

    The strides (1, then 2) are ours; the paper gives none, and these lead to its 6 x 6 positions. In the "bias-free"
    reading the only bias is the output's. In the "centred" reading every layer has one, and ``origin``, the code of the
    empty image, is subtracted from every code, so that zero capsules mean the empty image.
    """

    def __init__(self, settings: AutoencoderSettings = AutoencoderSettings()):
        super().__init__()
        self.settings, channels = settings, settings.channels
        self.filters1 = nn.Parameter(torch.randn(channels, 1, 9, 9) / 9)
        self.filters2 = nn.Parameter(torch.randn(channels, channels, 9, 9) / (9 * channels**0.5))
        self.output_bias = nn.Parameter(torch.zeros(1))
        biases = [nn.Parameter(torch.zeros(channels)) for _ in range(3)]
        self.biases = nn.ParameterList(biases) if settings.reading == "centred" else [None] * 3
        self.register_buffer("origin", torch.zeros(channels, *GRID))
        self.to(memory_format=torch.channels_last)  # about three times faster on CPUs

    def encode(self, images: Float[Tensor, "B 1 height width"]) -> Float[Tensor, "B C rows columns"]:
        """The 128 features at 6 x 6 positions, with the empty image at ``origin``; at more for a larger image."""
        first = F.leaky_relu(F.conv2d(images, self.filters1, self.biases[0]), self.settings.slope)
        return F.leaky_relu(F.conv2d(first, self.filters2, self.biases[1], stride=2), self.settings.slope)

    def decode_logits(self, features: Float[Tensor, "B C 6 6"]) -> Float[Tensor, "B 1 28 28"]:
        """The image before the sigmoid, from features with the empty image at ``origin``."""
        first = F.conv_transpose2d(features, self.filters2, self.biases[2], stride=2, output_padding=1)
        return F.conv_transpose2d(F.leaky_relu(first, self.settings.slope), self.filters1) + self.output_bias

    def forward(self, images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, ""]:
        """Cross-entropy per pixel of the reconstruction, in nats, with dropout while training."""
        features = F.dropout(self.encode(images), self.settings.dropout, self.training)
        return F.binary_cross_entropy_with_logits(self.decode_logits(features).float(), images)

    @torch.no_grad()
    def centre(self) -> None:
        """Set ``origin`` to the code of the empty image (zero in the bias-free reading)."""
        self.origin.copy_(self.encode(self.filters1.new_zeros(1, 1, 28, 28))[0])

    def features(self, images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, "B C 6 6"]:
        """The code of every image less the code of the empty image: what stage 2 sees."""
        return self.encode(images) - self.origin

    def image(self, features: Float[Tensor, "B C 6 6"]) -> Float[Tensor, "B 1 28 28"]:
        """The image of ``features``; undoes ``features`` as well as the autoencoder can."""
        return self.decode_logits(features + self.origin).sigmoid()


class CapsuleEncoder(nn.Module):
    """Stage 2: the weights W of the product of expert capsules.  Section 3, Algorithm 1."""

    def __init__(self, lower: int, lower_dim: int, settings: EncoderSettings = EncoderSettings()):
        super().__init__()
        if settings.views and not settings.sparsity:
            raise ValueError("views decide which capsules are left on; give sparsity settings too, or leave views out")
        self.settings = settings
        shape = (lower, settings.capsules, settings.dim, lower_dim)
        self.W = nn.Parameter(settings.initial_deviation * torch.randn(shape))
        sparsity = settings.sparsity
        self.sparsity = Sparsity(settings.capsules, sparsity, settings.steps) if sparsity else None

    @torch.no_grad()
    def couplings(
        self, x: Float[Tensor, "B I e"], explained: Float[Tensor, "B J"] | None = None
    ) -> Float[Tensor, "B I J"]:
        """Couplings by agreement; with sparsity, only over the capsules left on.

        Those are the capsules with the highest scores: of ``explained``, or else of how well each explains ``x``.
        """
        if self.sparsity is None:
            return self.route(x).coupling
        explained = explanation(x, self.W) if explained is None else explained
        mask = self.sparsity.mask(explained)
        if self.training:
            self.sparsity.update(explained)
        elif self.settings.sparsity.on_after_training == 1:  # it takes every coupling, whatever routing would say
            return mask.unsqueeze(1).expand(*x.shape[:2], -1)
        return share_out(self.route(x).coupling, mask)

    @torch.no_grad()
    def route(self, x: Float[Tensor, "B I e"]) -> RoutingState:
        """Routing by agreement with the options of the settings, before any capsule is turned off."""
        names = ("rounds", "over", "agreement", "sharpness")
        return route_with_agreement(x, self.W, **{name: getattr(self.settings, name) for name in names})

    def encode(self, x: Float[Tensor, "B I e"]) -> Float[Tensor, "B J d"]:
        """The squashed upper capsules.  Eqs. 3 and 4."""
        return squash(forward_map(x, self.W, self.couplings(x)))

    def forward(self, x: Float[Tensor, "B I e"]) -> Float[Tensor, ""]:
        """The contrastive divergence of a batch, whose derivative is Algorithm 1's update.

        With views in the settings the rows are groups of ``views.count`` that show the same thing: one decision for
        each group, from its mean explanation, and the divergence of its first ``views.learned`` rows.
        """
        if (views := self.settings.views) is None:
            return contrastive_divergence(x, self.W, self.couplings(x))
        with torch.no_grad():
            explained = explanation(x, self.W).unflatten(0, (-1, views.count)).mean(1)
        learned = x.unflatten(0, (-1, views.count))[:, : views.learned].flatten(0, 1)
        couplings = self.couplings(learned, explained.repeat_interleave(views.learned, dim=0))
        return contrastive_divergence(learned, self.W, couplings)


class CapsuleDecoder(nn.Module):
    """Stage 3: the weights U that turn upper capsules back into lower ones.  Section 4.1."""

    def __init__(self, lower: int, lower_dim: int, encoder: EncoderSettings, settings: DecoderSettings):
        super().__init__()
        self.settings, self.rounds = settings, encoder.rounds
        shape = (encoder.capsules, lower, lower_dim, encoder.dim)
        self.U = nn.Parameter(encoder.initial_deviation * torch.randn(shape))

    @torch.no_grad()
    def couplings(self, capsules: Float[Tensor, "B J d"]) -> Float[Tensor, "B J I"]:
        """e_ji by agreement: the capsules that are on (length above 0) share every lower capsule among them."""
        on = capsules.abs().amax(2) > 0
        return route(capsules, self.U, rounds=self.rounds, over="lower", on=on).coupling

    def decode(self, capsules: Float[Tensor, "B J d"]) -> Float[Tensor, "B I e"]:
        """z_i = sum over j of e_ji U_ji x_j, the lower capsules before the squash."""
        return forward_map(capsules, self.U, self.couplings(capsules))

    def forward(self, capsules: Float[Tensor, "B J d"], z_data: Float[Tensor, "B I e"]) -> Float[Tensor, ""]:
        """The training loss: the literal rule's, or the squared error of z_i per image."""
        if self.settings.rule == "literal":
            return self.literal_loss(capsules, z_data)
        return (self.decode(capsules) - z_data).square().sum((1, 2)).mean()

    def literal_loss(self, capsules: Float[Tensor, "B J d"], z_data: Float[Tensor, "B I e"]) -> Float[Tensor, ""]:
        """A scalar whose derivative with respect to U is minus the update that section 4.1 prints."""
        e = self.couplings(capsules)
        with torch.no_grad():
            z_model = forward_map(capsules, self.U, e)
            x_model = squash(reverse_map(z_model, self.U, e))
            data, model = (2 * z / (1 + z.square().sum(2, keepdim=True)) for z in (z_data, z_model))
        rise = data * forward_map(capsules, self.U, e) - model * forward_map(x_model, self.U, e)
        return -rise.sum((1, 2)).mean()


class ExpertCapsules(nn.Module):
    """The three stages as one model: images in [0, 1] to 20 capsules of 16 numbers and back.  Fig. 1."""

    def __init__(self, settings: Settings):
        super().__init__()
        self.settings = settings
        dim = settings.autoencoder.capsule_dim
        lower = GRID[0] * GRID[1] * settings.autoencoder.channels // dim
        self.autoencoder = ConvAutoencoder(settings.autoencoder)
        self.encoder = CapsuleEncoder(lower, dim, settings.encoder)
        self.decoder = CapsuleDecoder(lower, dim, settings.encoder, settings.decoder)
        self.poses = Poses(settings.encoder.capsules, settings.encoder.dim)

    def lower_preactivations(self, images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, "B I e"]:
        """z_i: the features as 576 capsules of 8, not yet squashed."""
        features = self.settings.encoder.input_scale * self.autoencoder.features(images)
        return to_capsules(features, self.settings.autoencoder.capsule_dim)

    def lower_capsules(self, images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, "B I e"]:
        """x_i = squash(z_i): what is routed."""
        return squash(self.lower_preactivations(images))

    def route(self, images: Float[Tensor, "B 1 28 28"]) -> Routing:
        """Couplings and upper capsules before the squash, sparsity included."""
        x = self.lower_capsules(images)
        coupling = self.encoder.couplings(x)
        return Routing(coupling, forward_map(x, self.encoder.W, coupling))

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, "B J d"]:
        """The squashed upper capsules of ``images`` in [0, 1].  Raises ValueError for other images."""
        require_images(images)
        parts = [self.encoder.encode(self.lower_capsules(part)) for part in images.split(_PART)]
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, capsules: Float[Tensor, "B J d"]) -> Float[Tensor, "B 1 28 28"]:
        """Images in [0, 1] of squashed upper capsules. Zero capsules take no part; all zero give the empty image."""
        require_shape(capsules, (None, *self.poses.mean.shape), "capsules", "[batch, capsules, dim]")
        require_floats(capsules=capsules)
        require_finite(capsules=capsules)
        return torch.cat([self.image(self.decoder.decode(part)) for part in capsules.split(_PART)])

    def image(self, z: Float[Tensor, "B I e"]) -> Float[Tensor, "B 1 28 28"]:
        """Images of lower capsules before the squash; undoes ``lower_preactivations``."""
        features = from_capsules(z, (self.settings.autoencoder.channels, *GRID))
        return self.autoencoder.image(features / self.settings.encoder.input_scale)

    def reconstruct(self, images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, "B 1 28 28"]:
        """``decode(encode(images))``: through all three stages and back."""
        return self.decode(self.encode(images))


_PART = 250  # images encoded or decoded at once, to bound memory
