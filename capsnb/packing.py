"""Numbers in few bits: the weight files of the browser, read by ``capsnb/web/weights.js``, and those that ship."""

from collections.abc import Collection

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# Bits of a number, and how many share a scale: the closest to torch that fits into 3.2 MB a data set. Others: float16.
PRECISION = {"U": (9, 32), "W": (8, 16), "filters2": (8, 64)}
_SCALES = ".scales"  # what is behind the name of filters of 8 bits in the name of their scales
_DAMPING = 0.01  # of the mean of a moment's diagonal, as in Frantar 2022


def pack(
    tensors: dict[str, Tensor], moments: dict[str, Tensor] | None = None, *, exact: bool = False
) -> tuple[bytes, dict]:
    """The bytes of a weight file, little-endian, and where in them each tensor lies and how it is written.

    "float32" if ``exact``. Else "float16", as trained weights ship, or for tensors in ``PRECISION``, which goes by
    what their names begin with, "int8" or "int9": multiples of the ``scales`` of their ``group``. An "int9" is twice
    its int8 plus one of the ``bits``. ``moments`` holds, for some of these, what ``quantised`` takes.
    """
    content, layout = b"", {}
    for name, tensor in tensors.items():
        kind, start = name.split(".")[0], len(content)
        small = kind in PRECISION and not exact
        entry, parts = _small(tensor, kind, (moments or {}).get(kind)) if small else _plain(tensor, exact)
        for place, part in parts.items():
            entry[place] = len(content)
            content += part.tobytes()
        layout[name] = entry | {"size": tensor.numel(), "bytes": len(content) - start}
        content += bytes(-len(content) % 4)  # the browser reads numbers only where their size divides the offset
    return content, layout


def _plain(tensor: Tensor, exact: bool) -> tuple[dict, dict]:
    return {"type": "float32" if exact else "float16"}, {"offset": _array(tensor, "<f4" if exact else "<f2")}


def _small(tensor: Tensor, kind: str, moment: Tensor | None) -> tuple[dict, dict]:
    bits, group = PRECISION[kind]
    whole, scales = quantised(tensor.detach(), bits, group, moment)
    parts = {"offset": _array(whole if bits == 8 else whole // 2, "i1"), "scales": _array(scales, "<f2")}
    if bits == 9:
        parts["bits"] = np.packbits(_array(whole % 2, "u1"), bitorder="little")
    return {"type": f"int{bits}", "group": group}, parts


def _array(tensor: Tensor, kind: str) -> np.ndarray:
    return tensor.detach().flatten().numpy().astype(kind)


def quantised(
    values: Float[Tensor, "*rows K"], bits: int, group: int, moment: Float[Tensor, "K K"] | None = None
) -> tuple[Float[Tensor, "*rows K"], Float[Tensor, " groups"]]:
    """Whole numbers of ``bits`` bits, and the half-precision scale of every ``group`` of them.

    ``moment`` is the second moment of what the rows multiply: then each rounding error is made up for by the numbers
    right of it, as far as what they multiply goes together with what it multiplies. Frantar 2022.
    """
    largest = 2 ** (bits - 1) - 1
    scales = (values.reshape(-1, group).abs().amax(1) / largest).half()
    steps = scales.float().clamp(min=1e-12).repeat_interleave(group).view(values.shape)
    if moment is None:
        return (values / steps).round().clamp(-largest, largest), scales
    damped = moment + _DAMPING * moment.diagonal().mean() * torch.eye(len(moment))
    follow = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    rest, whole = values.double(), torch.zeros_like(values)
    for k in range(len(moment)):
        whole[..., k] = (rest[..., k] / steps[..., k]).round().clamp(-largest, largest)
        error = (rest[..., k] - whole[..., k] * steps[..., k]) / follow[k, k]
        rest = rest - error.unsqueeze(-1) * follow[k] * (torch.arange(len(moment)) > k)
    return whole, scales


def shrunk(tensors: dict[str, Tensor], filters: Collection[str] = ()) -> dict[str, Tensor]:
    """Floating-point tensors in 16 bits, and of those named ``filters`` in 8, with a scale for every filter."""
    small = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    for name in filters:
        whole, scales = quantised(tensors[name].detach().float(), 8, tensors[name][0, 0].numel())
        small |= {name: whole.to(torch.int8), name + _SCALES: scales}
    return small


def restored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that ``shrunk`` was given, as near as their bits allow; others as they are."""
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(_SCALES)}
    for name in found:
        if (scales := tensors.get(name + _SCALES)) is not None:
            found[name] = (tensors[name].float().view(len(scales), -1) * scales.float()[:, None]).view_as(found[name])
    return found
