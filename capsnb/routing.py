"""Routing by agreement, and the forward and reverse maps for given couplings.  Eq. 3, Algorithm 1.

Axes: lower capsules i (I of them, e numbers each), upper capsules j (J of them, d numbers each). The votes [B, I, J, d]
of a batch are never stored: ``route`` runs routing.c on CPUs and routing_gpu.py on CUDA GPUs, which cast each vote anew
whenever they need it; where these cannot, it runs ``route_steps``, the readable reference, on a part of the batch at a
time. The forward and reverse maps are matrix products, on CPUs one for each capsule of the smaller layer.
"""

import math
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from capsnb import native
from capsnb.capsules import squash
from capsnb.checks import require_choice, require_finite, require_floats, require_shape

_NORMALISED_AXIS = {"upper": 1, "lower": 2}  # of the logits, which are held as [B, J, I, 1]


class Routing(NamedTuple):
    """What routing by agreement returns."""

    coupling: Float[Tensor, "B I J"]
    z: Float[Tensor, "B J d"]


class RoutingState(NamedTuple):
    """The state after one round: as ``Routing``, and how well the votes for each upper capsule agree."""

    coupling: Float[Tensor, "B I J"]
    z: Float[Tensor, "B J d"]
    agreement: Float[Tensor, "B J"]


def route(
    x: Float[Tensor, "B I e"],
    W: Float[Tensor, "I J d e"],
    *,
    rounds: int = 3,
    over: str = "upper",
    agreement: str = "cosine",
    sharpness: float = 1.0,
    on: Bool[Tensor, "B I"] | None = None,
) -> Routing:
    """Couplings and upper capsules after ``rounds`` of routing by agreement.  Section 2.2, eq. 3.

    The first round couples everything equally; each later one adds ``sharpness`` (an inverse temperature) times the
    agreement of vote and capsule to the logits: their cosine, or with ``agreement="inner"`` the scalar product of the
    vote and the squashed capsule (Sabour 2017).
    ``over="upper"`` makes the couplings of one lower capsule sum to 1 (Sabour 2017), ``"lower"`` those of one upper
    capsule (the sum over i that Hauser 2019 prints). Lower capsules that are not ``on`` take no part (default: all do).
    Raises ValueError for wrong shapes, NaN, an unknown axis or agreement, rounds < 1, sharpness not above 0.
    """
    state = route_with_agreement(x, W, rounds=rounds, over=over, agreement=agreement, sharpness=sharpness, on=on)
    return Routing(state.coupling, state.z)


def route_with_agreement(
    x: Float[Tensor, "B I e"],
    W: Float[Tensor, "I J d e"],
    *,
    rounds: int = 3,
    over: str = "upper",
    agreement: str = "cosine",
    sharpness: float = 1.0,
    on: Bool[Tensor, "B I"] | None = None,
) -> RoutingState:
    """As ``route``, with how well the votes agree in the end: ‖z_j‖ over the coupling-weighted sum of their lengths.

    This is 1 when all votes point one way and 0 when they cancel (the mean resultant length of directional statistics).
    """
    _check(x, W)
    options = {"rounds": rounds, "over": over, "agreement": agreement, "sharpness": sharpness}
    _check_options(**options)
    on = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if on is None else on
    fast = without_votes(x.device)
    if agreement == "cosine" and fast.can_route(x, W, rounds, sharpness):
        return RoutingState(*fast.route(x, on.to(x), W, rounds, over == "upper", sharpness))
    chunk = _CHUNK if x.device.type == "cpu" else at_once(W[..., 0].numel())
    parts = zip(x.split(chunk), on.split(chunk))
    last = [route_steps(part, W, on=here, **options)[-1] for part, here in parts]
    return RoutingState(*map(torch.cat, zip(*last)))


def without_votes(device: torch.device) -> ModuleType:
    """The module that routes on ``device`` without storing votes, where it can."""
    if device.type == "cuda":
        from capsnb import routing_gpu  # Triton is not loaded where nobody asks for it

        return routing_gpu
    return native


_CHUNK = 16  # images whose votes are held at once: small enough for the processor's cache
_NUMBERS_AT_ONCE = 2**28  # on an accelerator: 1 GiB in single precision


def at_once(numbers: int) -> int:
    """How many parts of so many ``numbers`` an accelerator should be given at once, at least 1."""
    return max(1, _NUMBERS_AT_ONCE // max(1, numbers))


def route_steps(
    x: Float[Tensor, "B I e"],
    W: Float[Tensor, "I J d e"],
    *,
    rounds: int,
    over: str = "upper",
    agreement: str = "cosine",
    sharpness: float = 1.0,
    on: Bool[Tensor, "B I"] | None = None,
) -> list[RoutingState]:
    """The state after every round, the last being what ``route`` returns; holds all votes of the batch at once."""
    votes = _votes(x, W)
    vote_length = torch.linalg.vector_norm(votes, dim=-1, keepdim=True)
    logits, states = torch.zeros_like(vote_length), []
    taking_part = torch.ones_like(x[..., 0]) if on is None else on.to(x)
    taking_part = taking_part[:, None, :, None]
    # Half the lowest number: below the logit of any capsule that takes part, and differences of it stay finite.
    logits = logits + (1 - taking_part) * (torch.finfo(x.dtype).min / 2)
    for done in range(rounds):
        coupling = taking_part * logits.softmax(dim=_NORMALISED_AXIS[over])
        z = coupling.transpose(2, 3) @ votes
        states.append(_state(coupling, z, vote_length))
        if done < rounds - 1:
            logits = logits + sharpness * _AGREEMENT[agreement](votes, z, vote_length)
    return states


def _cosine(votes: Tensor, z: Tensor, vote_length: Tensor) -> Tensor:
    direction = torch.nn.functional.normalize(z, dim=-1, eps=1e-12)
    return votes @ direction.transpose(2, 3) / vote_length.clamp(min=1e-12)


def _inner(votes: Tensor, z: Tensor, vote_length: Tensor) -> Tensor:
    return votes @ squash(z).transpose(2, 3)


_AGREEMENT = {"cosine": _cosine, "inner": _inner}


def _state(coupling: Tensor, z: Tensor, vote_length: Tensor) -> RoutingState:
    """From the layout used while routing, with axes [B, J, I, d], to the paper's."""
    total = (coupling * vote_length).sum((2, 3)).clamp(min=1e-12)
    agreement = torch.linalg.vector_norm(z.squeeze(2), dim=-1) / total
    return RoutingState(coupling.squeeze(3).transpose(1, 2), z.squeeze(2), agreement)


def _votes(x: Tensor, W: Tensor) -> Tensor:
    """Every lower capsule's prediction of every upper capsule, z_{j given i} = W_ij x_i, as [B, J, I, d]."""
    lower, upper, d, e = W.shape
    votes = x.transpose(0, 1) @ W.permute(0, 3, 1, 2).reshape(lower, e, upper * d)
    return votes.view(lower, len(x), upper, d).permute(1, 2, 0, 3).contiguous()


def forward_map(
    x: Float[Tensor, "B I e"], W: Float[Tensor, "I J d e"], coupling: Float[Tensor, "B I J"]
) -> Float[Tensor, "B J d"]:
    """z_j = sum over i of c_ij W_ij x_i for given couplings.  Eq. 3; in Algorithm 1 "route capsules forward"."""
    lower, upper, d, e = W.shape
    if x.device.type != "cpu":
        return forward_at_once(x, W, coupling)
    if lower < upper:
        return _forward_by_lower(x, W, coupling)
    by_upper = zip(coupling.permute(2, 0, 1).contiguous(), _matrices(W))
    return torch.stack([_forward_one(x, c, matrix) for c, matrix in by_upper], dim=1)


def reverse_map(
    capsules: Float[Tensor, "B J d"], W: Float[Tensor, "I J d e"], coupling: Float[Tensor, "B I J"]
) -> Float[Tensor, "B I e"]:
    """z_i = sum over j of c_ij W_ijᵀ x_j for given couplings; in Algorithm 1 "reconstruct input capsules"."""
    return forward_map(capsules, W.permute(1, 0, 3, 2), coupling.transpose(1, 2))


def _forward_one(x: Tensor, c: Tensor, matrix: Tensor) -> Tensor:
    """One upper capsule's z, [B, d]; images that do not couple to it cost nothing."""
    rows = _coupled(c)
    if len(rows) == len(x):
        return (c.unsqueeze(2) * x).flatten(1) @ matrix
    z = (c[rows].unsqueeze(2) * x[rows]).flatten(1) @ matrix
    return z.new_zeros(len(x), matrix.shape[1]).index_add(0, rows, z)


def _forward_by_lower(x: Tensor, W: Tensor, coupling: Tensor) -> Tensor:
    """All z, one lower capsule's votes after the other: fewer, larger products where the lower capsules are few."""
    z = x.new_zeros(len(x), *W.shape[1:3])
    for part, c, matrix in zip(x.unbind(1), coupling.unbind(1), _matrices(W.permute(1, 0, 3, 2))):
        rows = _coupled(c)
        votes = (part[rows] @ matrix.T).view(len(rows), *W.shape[1:3])
        z = z.index_add(0, rows, c[rows].unsqueeze(2) * votes)
    return z


def forward_at_once(x: Tensor, W: Tensor, coupling: Tensor) -> Tensor:
    """``forward_map`` as few large products, for accelerators: they finish one sooner than they can begin twenty.

    Nothing is left out, since to know what may be left out the processor would have to wait for the accelerator.
    """
    count = at_once(x.numel())  # upper capsules
    parts = zip(coupling.permute(2, 0, 1).split(count), _matrices(W).split(count))
    return torch.cat([(c.unsqueeze(3) * x).flatten(2) @ matrices for c, matrices in parts]).transpose(0, 1)


def _coupled(c: Float[Tensor, "B n"]) -> Tensor:
    """The numbers of the images with a coupling that is not zero."""
    return c.detach().abs().amax(1).nonzero()[:, 0]


def _matrices(W: Float[Tensor, "I J d e"]) -> Float[Tensor, "J Ie d"]:
    """One matrix for each upper capsule."""
    lower, upper, d, e = W.shape
    return W.permute(1, 0, 3, 2).reshape(upper, lower * e, d)


def _check(x: Tensor, W: Tensor) -> None:
    require_shape(W, (None, None, None, None), "W", "[I, J, d, e]")
    require_shape(x, (None, W.shape[0], W.shape[3]), "x", "[B, I, e] with the I and e of W [I, J, d, e]")
    require_floats(x=x, W=W)
    require_finite(x=x, W=W)


def _check_options(rounds: int, over: str, agreement: str, sharpness: float) -> None:
    require_choice(over, _NORMALISED_AXIS, "over")
    require_choice(agreement, _AGREEMENT, "agreement")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, expected at least 1")
    if not 0 < sharpness < math.inf:
        raise ValueError(f"sharpness is {sharpness}, expected a number above 0; 1 is the plain agreement")
