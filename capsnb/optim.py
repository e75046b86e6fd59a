"""Momentum whose step is made orthogonal, capsule by capsule: the default optimiser of stage 2."""

import torch
from jaxtyping import Float
from torch import Tensor


class OrthogonalMomentum(torch.optim.Optimizer):
    """Momentum SGD on weights [I, J, d, e] in which every pose direction of a capsule takes a step of the same length.

    For each upper capsule j the momentum is read as a matrix [d, I·e] and replaced by the nearest matrix with
    orthonormal rows, so that the small directions of a pose grow as fast as the one large one. This is Muon's step
    (Jordan2024) for a stack of matrices, with an exact inverse root in place of its iteration. The weight decay is
    decoupled: W shrinks by ``lr * weight_decay`` a step.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Make one update from the gradients."""
        for group in self.param_groups:
            for weights in group["params"]:
                memory = self.state[weights].setdefault("momentum_buffer", torch.zeros_like(weights))
                memory.mul_(group["momentum"]).add_(weights.grad)
                weights.mul_(1 - group["lr"] * group["weight_decay"])
                weights.sub_(orthogonal(memory), alpha=group["lr"])


def orthogonal(weights: Float[Tensor, "I J d e"]) -> Float[Tensor, "I J d e"]:
    """For each j the nearest matrix [d, I·e] with orthonormal rows; directions without any length stay without."""
    matrices = weights.permute(1, 2, 0, 3).flatten(2)
    squares, directions = torch.linalg.eigh((matrices @ matrices.transpose(1, 2)).double())
    floor = (1e-10 * squares[:, -1:]).clamp(min=1e-30)
    root = directions * squares.maximum(floor).rsqrt().unsqueeze(1) @ directions.transpose(1, 2)
    result = root.to(matrices) @ matrices
    return result.unflatten(2, (weights.shape[0], weights.shape[3])).permute(2, 0, 1, 3)
