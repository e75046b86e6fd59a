"""What the benchmarks compare with: routing and the stage 2 update as public capsule code writes them, over votes.

The votes [B, J, I, d] are made by one einsum and kept; every later line reads them. Of the layouts tried, this one is
the fastest: the weighted sum and the agreement become matrix products along whole rows.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from capsnb.capsules import squash
from capsnb.sparsity import Sparsity, share_out


def votes_of(x: Tensor, W: Tensor) -> Tensor:
    """z_{j given i} = W_ij x_i, contiguous, [B, J, I, d]."""
    return torch.einsum("bie,ijde->bjid", x, W).contiguous()


def route(x: Tensor, W: Tensor, rounds: int = 3) -> tuple[Tensor, Tensor]:
    """Sabour 2017's routing, the leanest form: softmax over j, weighted sum, dot-product agreement with squash(z)."""
    votes = votes_of(x, W)
    logits = votes.new_zeros(*votes.shape[:3])
    for done in range(rounds):
        coupling = logits.softmax(1)
        z = (coupling.unsqueeze(2) @ votes).squeeze(2)
        if done < rounds - 1:
            logits = logits + (votes @ squash(z).unsqueeze(3)).squeeze(3)
    return coupling.transpose(1, 2), z


def route_by_cosine(votes: Tensor, rounds: int = 3) -> Tensor:
    """The couplings [B, J, I] of ``capsnb.route``, from stored votes."""
    length = torch.linalg.vector_norm(votes, dim=3).clamp(min=1e-12)
    logits = torch.zeros_like(length)
    for done in range(rounds):
        coupling = logits.softmax(1)
        if done < rounds - 1:
            direction = F.normalize((coupling.unsqueeze(2) @ votes).squeeze(2), dim=2)
            logits = logits + (votes @ direction.unsqueeze(3)).squeeze(3) / length
    return coupling


def stage2_loss(x: Tensor, W: Tensor, sparsity: Sparsity | None) -> Tensor:
    """The loss of ``CapsuleEncoder.forward`` while training, without views and sharpness: the same by einsums."""
    with torch.no_grad():
        votes = votes_of(x, W)
        coupling = route_by_cosine(votes).transpose(1, 2)
        if sparsity is not None:
            explained = explanation(x, W, votes)
            mask = sparsity.mask(explained)
            sparsity.update(explained)
            coupling = share_out(coupling, mask)
        capsules = squash(torch.einsum("bij,bjid->bjd", coupling, votes))
        x_model = squash(torch.einsum("bjd,ijde,bij->bie", capsules, W, coupling))
    energies = [torch.einsum("bij,bjid->bjd", coupling, votes_of(each, W)).square() for each in (x, x_model)]
    data, model = (-each.sum(2).log1p().sum(1) for each in energies)
    return (data - model).mean()


def explanation(x: Tensor, W: Tensor, votes: Tensor) -> Tensor:
    """``capsnb.sparsity.explanation``, keeping what every capsule sends back, [B, J, I, e]."""
    capsules = squash(votes.sum(2))
    sent_back = squash(torch.einsum("bjd,ijde->bjie", capsules, W))
    return torch.cosine_similarity(sent_back.flatten(2), x.flatten(1).unsqueeze(1), dim=2)
