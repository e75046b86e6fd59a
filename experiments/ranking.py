"""Scores to rank capsules by, which ``sparse_experts`` compares, and an encoder that ranks by any of them."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsnb.model import GRID, CapsuleEncoder
from capsnb.routing import RoutingState
from capsnb.settings import EncoderSettings
from capsnb.sparsity import explanation, share_out, support

POSITIONS = GRID[0] * GRID[1]  # of lower capsules
MEMORY = 0.99  # of the running mean and deviation in the standardised agreement


class Variant(NamedTuple):
    """What is trained: settings, what capsules are ranked by, whether masked couplings are made to sum to 1 again."""

    settings: EncoderSettings
    score: str = "explanation"
    shared_out: bool = True


SCORES = {
    "explanation": lambda x, W, routed: explanation(x, W),
    "length": lambda x, W, routed: torch.linalg.vector_norm(routed.z, dim=2),
    "support": lambda x, W, routed: support(routed.coupling, POSITIONS),
    "agreement": lambda x, W, routed: routed.agreement,
    "standardised": lambda x, W, routed: routed.agreement,
}


class Standardised(nn.Module):
    """A score less its running mean, over its running deviation, capsule by capsule; both move while training."""

    def __init__(self, capsules: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(capsules))
        self.register_buffer("variance", torch.zeros(capsules))
        self.register_buffer("updates", torch.zeros(()))

    def forward(self, score: Float[Tensor, "B J"]) -> Float[Tensor, "B J"]:
        if self.training:
            self.updates += 1
            weight = max(1 - MEMORY, 1 / self.updates.item())
            self.mean.lerp_(score.mean(0), weight)
            self.variance.lerp_(score.var(0), weight)
        return (score - self.mean) / self.variance.sqrt().clamp(min=1e-12)


class AblatedEncoder(CapsuleEncoder):
    """An encoder whose capsules are ranked by another score, or whose masked couplings are left as they are.

    Boosts are steps of a fixed size. So that they do not mean less or more than for the explanation, another score is
    scaled so that it deviates from capsule to capsule by ``unit``.
    """

    def __init__(self, encoder: CapsuleEncoder, variant: Variant, unit: float):
        lower, upper, _, lower_dim = encoder.W.shape
        super().__init__(lower, lower_dim, encoder.settings)
        self.load_state_dict(encoder.state_dict())
        self.variant, self.unit = variant, unit
        self.standardise = Standardised(upper) if variant.score == "standardised" else nn.Identity()

    @torch.no_grad()
    def couplings(self, x: Float[Tensor, "B I e"]) -> Float[Tensor, "B I J"]:
        """As in the library; after training one capsule is on and, where couplings are shared out, takes them all."""
        routed = self.route(x)
        score = self.score(x, routed)
        mask = self.sparsity.mask(score)
        if self.training:
            self.sparsity.update(score)
        if not self.variant.shared_out:
            return routed.coupling * mask.unsqueeze(1)
        return share_out(routed.coupling, mask) if self.training else mask.unsqueeze(1).expand_as(routed.coupling)

    def score(self, x: Float[Tensor, "B I e"], routed: RoutingState) -> Float[Tensor, "B J"]:
        """What capsules are ranked by, before any boost."""
        score = self.standardise(SCORES[self.variant.score](x, self.W, routed))
        if self.variant.score == "explanation":
            return score
        return score * (self.unit / score.std(1).mean().clamp(min=1e-12))
