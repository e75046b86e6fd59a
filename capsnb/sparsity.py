"""Which upper capsules may fire: how well each explains the image, rank mask, boosting.

Rank mask and boosting follow Rawlinson 2018 (their eq. 3 and section 2.3), the mask that grows sharper the neural gas
of Martinetz 1991, the conscience that of DeSieno 1988. Ranking by what a capsule alone sends back, and sharing the
couplings out again among the capsules left on, are ours.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from capsnb import distributed
from capsnb.capsules import squash
from capsnb.routing import at_once
from capsnb.settings import SparsitySettings


def explanation(x: Float[Tensor, "B I e"], W: Float[Tensor, "I J d e"]) -> Float[Tensor, "B J"]:
    """The cosine between x and the model phase of each upper capsule alone, coupled to everything with weight 1.

    It asks of every expert: if you alone had to send the image back, how much of it would come back?
    """
    lower, upper, d, e = W.shape
    x = x.transpose(1, 2).contiguous()  # [B, e, I], so that the sums over e below run along whole rows
    flat, cosines = x.flatten(1), []
    count = 1 if x.device.type == "cpu" else at_once(x.numel())  # upper capsules
    for matrices in W.permute(1, 3, 0, 2).reshape(upper, e * lower, d).split(count):
        z = (squash(flat @ matrices) @ matrices.mT).unflatten(2, (e, lower))  # [count, B, e, I]
        square = z.square().sum(2)
        squashed = square.clamp(min=1e-24).sqrt() / (1 + square)  # squash(z) is z times this
        product, length = (squashed * (z * x).sum(2)).sum(2), (squashed.square() * square).sum(2)
        cosines.append(product / length.clamp(min=1e-16).sqrt())
    return torch.cat(cosines).T / torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp(min=1e-8)


def support(coupling: Float[Tensor, "B I J"], positions: int) -> Float[Tensor, "B J"]:
    """ψ_j: the largest coupling of the lower capsules at one position, summed over all positions.  Rawlinson 2018.

    The lower capsules of a position must be neighbours, as ``to_capsules`` puts them.
    """
    return coupling.unflatten(1, (positions, -1)).amax(2).sum(1)


def rank(score: Float[Tensor, "B J"]) -> Float[Tensor, "B J"]:
    """How many capsules of the image score higher: 0 for the highest; of equals one comes first.  Rawlinson 2018."""
    return score.argsort(dim=1, descending=True).argsort(dim=1).to(score)


def rank_mask(score: Float[Tensor, "B J"], gamma: float, cut: float) -> Float[Tensor, "B J"]:
    """exp(-gamma rank/(J - 1)), rank 0 the highest score; values below ``cut`` are 0.  Rawlinson 2018, eq. 3."""
    mask = torch.exp(-gamma * rank(score) / max(score.shape[1] - 1, 1))
    return torch.where(mask < cut, 0, mask)


def share_out(coupling: Float[Tensor, "B I J"], mask: Float[Tensor, "B J"]) -> Float[Tensor, "B I J"]:
    """The couplings times the mask, made to sum to 1 over the capsules left on."""
    masked = coupling * mask.unsqueeze(1)
    return masked / masked.sum(2, keepdim=True).clamp(min=1e-12)


class Sparsity(nn.Module):
    """The state behind the mask: the share of the images that every capsule wins of late, and its boost."""

    def __init__(self, capsules: int, settings: SparsitySettings, steps: int):
        super().__init__()
        self.settings, self.steps = settings, steps
        self.register_buffer("share", torch.full((capsules,), 1 / capsules))
        self.register_buffer("boost", torch.zeros(capsules))
        self.register_buffer("updates", torch.zeros(()))

    def mask(self, explanation: Float[Tensor, "B J"]) -> Float[Tensor, "B J"]:
        """While training the rank mask of the score; afterwards 1 for those that explain most, whatever they won."""
        if self.training:
            return rank_mask(self.score(explanation), self.gamma, self.settings.cut)
        on = explanation.topk(self.settings.on_after_training, dim=1).indices
        return torch.zeros_like(explanation).scatter(1, on, 1.0)

    def score(self, explanation: Float[Tensor, "B J"]) -> Float[Tensor, "B J"]:
        """What capsules are ranked by while training: explanation, boost, and the conscience of frequent winners."""
        return explanation + self.boost - self.settings.conscience * (len(self.share) * self.share - 1)

    @property
    def gamma(self) -> float:
        """The mask's sharpness now: from ``gamma_first`` to ``gamma_last`` over training, as in a neural gas."""
        first, last = self.settings.gamma_first, self.settings.gamma_last
        return first + (last - first) * min(1.0, self.updates.item() / self.steps)

    @torch.no_grad()
    def update(self, explanation: Float[Tensor, "B J"]) -> None:
        """Move the winning shares towards this batch, and the boosts of capsules that win too seldom or too often."""
        settings, count = self.settings, explanation.shape[1]
        self.updates += 1
        winner = self.score(explanation).argmax(1)
        wins = distributed.mean(F.one_hot(winner, count).to(self.share).mean(0))
        self.share.lerp_(wins, 1 - settings.running)
        self.boost += settings.boost_step * (self.share < settings.share_low / count)
        self.boost -= settings.boost_step * (self.share > settings.share_high / count)
