"""Routing by agreement on NVIDIA GPUs with no votes stored: routing.c once more, in Triton.

A round is two kernels. In ``_mix`` every program casts the votes of PART lower capsules for all upper ones, for some
images at once, uses them and forgets them; it leaves sums over its lower capsules. ``_turn`` adds these up and finds
the direction of every upper capsule, which the next round asks for. Nothing of the size of the votes is ever written.
"""

import warnings
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from capsnb.native import is_plain
from capsnb.routing import route_steps

try:
    import triton
    import triton.language as tl
except ImportError:  # without it, as on macOS and Windows, every device takes the plain way
    triton = None

PART = 16  # lower capsules a program
PARTS_AT_ONCE = 64  # programs whose sums are added up at once
MIX_WARPS, TURN_WARPS = 8, 1  # groups of 32 threads a program
_NUMBERS = 4096  # a program's votes from one lower capsule, for all its images: as many as registers hold


def can_route(x: Tensor, W: Tensor, rounds: int, sharpness: float = 1.0) -> bool:
    """Whether ``route`` can run here on these: single precision on a CUDA GPU, no derivative asked for, bounded logits.

    The upper capsules may have 4,096 numbers in all, both sizes rounded up to powers of two, and every array fewer than
    2^31. And the kernels must have agreed with the plain way on this GPU. The first call finds that out; it compiles.
    """
    here = triton is not None and x.device.type == "cuda" and W.device == x.device
    if not here or not is_plain(x, W, rounds, sharpness):
        return False
    return _padded(W) <= _NUMBERS and _largest(x, W) < 2**31 and _works(x.device)


def _padded(W: Tensor) -> int:
    """The numbers of all votes of one lower capsule, in blocks of powers of two."""
    return triton.next_power_of_2(W.shape[1]) * triton.next_power_of_2(W.shape[2])


def _largest(x: Tensor, W: Tensor) -> int:
    """The numbers of the largest array; the kernels count them in 32 bits."""
    lower, upper, d, _ = W.shape
    return max(x.numel(), W.numel(), len(x) * lower * upper, len(x) * triton.cdiv(lower, PART) * upper * d)


def route(
    x: Float[Tensor, "B I e"],
    on: Float[Tensor, "B I"],
    W: Float[Tensor, "I J d e"],
    rounds: int,
    over_upper: bool,
    sharpness: float = 1.0,
) -> tuple[Float[Tensor, "B I J"], Float[Tensor, "B J d"], Float[Tensor, "B J"]]:
    """Coupling, z and agreement after ``rounds``; ``on`` is 1 for lower capsules that take part and 0 for others."""
    batch, (lower, upper, d, e) = len(x), W.shape
    images = max(1, min(triton.next_power_of_2(batch), 16, _NUMBERS // _padded(W)))
    parts = triton.cdiv(lower, PART)
    x, on, W = x.contiguous(), on.contiguous(), W.permute(0, 3, 1, 2).contiguous()  # W [I, e, J, d]: rows of votes
    coupling, agreement = x.new_empty(batch, lower, upper), x.new_empty(batch, upper)
    z, direction = x.new_empty(2, batch, upper, d)
    sums = x.new_empty(parts, batch, upper, d)
    weights, lengths = x.new_empty(2, parts, batch, upper)
    scale = torch.empty_like(agreement)
    blocks = {"D": d, "BLOCK_D": triton.next_power_of_2(d), "OVER_UPPER": over_upper}
    tile = {"E": e, "BLOCK_J": triton.next_power_of_2(upper), "IMAGES": images, "LOWER": PART}
    for done in range(rounds):
        when = {"FIRST": done == 0, "LAST": done == rounds - 1}
        inputs = x, on, W, direction, coupling, sums, weights, lengths, batch, lower, upper, sharpness
        results = sums, weights, lengths, z, direction, agreement, scale, parts, batch * upper
        with torch.cuda.device_of(x):  # the one that Triton takes
            _mix[triton.cdiv(batch, images), parts](*inputs, **blocks, **tile, **when, num_warps=MIX_WARPS)
            _turn[(batch * upper,)](*results, **blocks, BLOCK_PARTS=PARTS_AT_ONCE, num_warps=TURN_WARPS)
    return coupling if over_upper else coupling * scale.unsqueeze(1), z, agreement


if triton is not None:

    @triton.jit(do_not_specialize=["batch", "lower", "upper"])  # or every size of a batch would be compiled anew
    def _mix(
        x, on, W, direction, coupling, sums, weights, lengths, batch, lower, upper, sharpness,
        D: tl.constexpr, BLOCK_D: tl.constexpr, OVER_UPPER: tl.constexpr, E: tl.constexpr, BLOCK_J: tl.constexpr,
        IMAGES: tl.constexpr, LOWER: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    ):  # fmt: skip
        """x [B, I, E], on [B, I], W [I, E, J, D], direction [B, J, D]; coupling [B, I, J] holds the logits till LAST.

        The results are sums over the program's lower capsules: of the mixed votes, [parts, B, J, D], of the weights
        and of weight times length, [parts, B, J].
        """
        kind: tl.constexpr = x.dtype.element_ty
        part = tl.program_id(1)
        b, j, d = tl.program_id(0) * IMAGES + tl.arange(0, IMAGES), tl.arange(0, BLOCK_J), tl.arange(0, BLOCK_D)
        here, there, rows = b < batch, j < upper, (j[:, None] < upper) & (d[None, :] < D)
        both, all_three = here[:, None] & there[None, :], here[:, None, None] & rows[None, :, :]
        capsule = b[:, None] * upper + j[None, :]
        numbers = capsule[:, :, None] * D + d[None, None, :]
        z = tl.zeros((IMAGES, BLOCK_J, BLOCK_D), kind)
        weight_sum, length_sum = tl.zeros((IMAGES, BLOCK_J), kind), tl.zeros((IMAGES, BLOCK_J), kind)
        if not FIRST:
            towards = tl.load(direction + numbers, mask=all_three, other=0)
        for i in range(part * LOWER, tl.minimum((part + 1) * LOWER, lower)):
            votes = tl.zeros((IMAGES, BLOCK_J, BLOCK_D), kind)
            for e in tl.static_range(E):
                w = tl.load(W + ((i * E + e) * upper + j[:, None]) * D + d[None, :], mask=rows, other=0)
                votes += tl.load(x + (b * lower + i) * E + e, mask=here, other=0)[:, None, None] * w[None, :, :]
            length = tl.sqrt(tl.sum(votes * votes, 2))
            place = coupling + (b[:, None] * lower + i) * upper + j[None, :]
            logits = tl.zeros((IMAGES, BLOCK_J), kind)
            if not FIRST:
                cosine = tl.sum(votes * towards, 2) / tl.maximum(length, 1e-12)
                logits = tl.load(place, mask=both, other=0) + sharpness * cosine
            taking_part = tl.load(on + b * lower + i, mask=here, other=0)
            weight = tl.where(there[None, :], taking_part[:, None] * tl.exp(logits), 0)
            if OVER_UPPER:
                weight = weight / tl.maximum(tl.sum(weight, 1), 1e-12)[:, None]
            tl.store(place, weight if LAST else logits, mask=both)
            z += weight[:, :, None] * votes
            weight_sum += weight
            length_sum += weight * length
        tl.store(sums + part * batch * upper * D + numbers, z, mask=all_three)
        tl.store(weights + part * batch * upper + capsule, weight_sum, mask=both)
        tl.store(lengths + part * batch * upper + capsule, length_sum, mask=both)

    @triton.jit(do_not_specialize=["parts", "capsules"])
    def _turn(
        sums, weights, lengths, z, direction, agreement, scale, parts, capsules,
        D: tl.constexpr, BLOCK_D: tl.constexpr, OVER_UPPER: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    ):  # fmt: skip
        """One upper capsule of one image: adds up its parts; couplings over the lower ones are the weights by scale."""
        kind: tl.constexpr = sums.dtype.element_ty
        capsule, d = tl.program_id(0), tl.arange(0, BLOCK_D)
        mixed, weight, total = tl.zeros((BLOCK_D,), kind), tl.zeros((), kind), tl.zeros((), kind)
        for first in range(0, parts, BLOCK_PARTS):
            part = first + tl.arange(0, BLOCK_PARTS)
            row, inside = part * capsules + capsule, part < parts
            every = tl.load(sums + row[:, None] * D + d[None, :], mask=inside[:, None] & (d[None, :] < D), other=0)
            mixed += tl.sum(every, 0)
            weight += tl.sum(tl.load(weights + row, mask=inside, other=0), 0)
            total += tl.sum(tl.load(lengths + row, mask=inside, other=0), 0)
        by = tl.full((), 1, kind)
        if not OVER_UPPER:
            by = by / tl.maximum(weight, 1e-12)
        mixed, total = mixed * by, total * by
        length = tl.sqrt(tl.sum(mixed * mixed, 0))
        tl.store(z + capsule * D + d, mixed, mask=d < D)
        tl.store(direction + capsule * D + d, mixed / tl.maximum(length, 1e-12), mask=d < D)
        tl.store(agreement + capsule, length / tl.maximum(total, 1e-12))
        tl.store(scale + capsule, by)


@cache
def _works(device: torch.device) -> bool:
    """Whether the kernels compile for this GPU and agree there with the plain way, in both readings of the sum."""
    rng = torch.Generator().manual_seed(0)
    x, W = torch.rand(5, 37, 8, generator=rng).to(device), torch.randn(37, 11, 16, 8, generator=rng).to(device)
    try:
        for over in ("upper", "lower"):
            found = route(x, x.new_ones(5, 37), W, 3, over == "upper")
            for here, plain in zip(found, route_steps(x.double(), W.double(), rounds=3, over=over)[-1]):
                torch.testing.assert_close(here.double(), plain, rtol=1e-3, atol=1e-4)
    except Exception as error:  # whatever a compiler, a driver or a comparison may say
        warnings.warn(f"routing takes the plain way on {device}: {error}", stacklevel=2)
        return False
    return True
