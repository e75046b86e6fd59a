"""routing.c, compiled for this processor when it is first needed: what ``route`` runs on CPUs.

Compiling takes a fraction of a second and every process does it anew, so nothing is left behind and nothing can be
stale. Where there is no C compiler, or with CAPSNB_NATIVE=0 in the environment, ``route`` takes the plain way.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

_LANES = 16  # images in a block, as in routing.c
_LARGEST_LOGIT = 24  # routing.c wants sums of exponentials above 1e-12; a round moves a logit by at most the sharpness
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")


@cache
def compiled(d: int, e: int) -> Callable[..., int] | None:
    """``route_block`` of routing.c for votes of ``d`` from capsules of ``e``; None where it cannot be compiled."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get("CAPSNB_NATIVE") == "0":
        return None
    with tempfile.TemporaryDirectory() as folder:
        library, source = Path(folder) / "routing.so", Path(__file__).with_name("routing.c")
        command = [compiler, *_FLAGS, f"-DD={d}", f"-DE={e}", str(source), "-o", str(library), "-lm"]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        function = ctypes.CDLL(str(library)).route_block
    function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_long] * 2 + [ctypes.c_int] * 2 + [ctypes.c_float]
    return function


def can_route(x: Tensor, W: Tensor, rounds: int, sharpness: float = 1.0) -> bool:
    """Whether ``route`` can run here on these: single precision on a CPU, no derivative asked for, bounded logits."""
    plain = x.device.type == W.device.type == "cpu" and x.dtype == W.dtype == torch.float32
    derivative = torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)
    bounded = rounds * sharpness <= _LARGEST_LOGIT
    return plain and not derivative and len(x) > 0 and bounded and compiled(*W.shape[2:]) is not None


def route(
    x: Float[Tensor, "B I e"],
    on: Float[Tensor, "B I"],
    W: Float[Tensor, "I J d e"],
    rounds: int,
    over_upper: bool,
    sharpness: float = 1.0,
) -> tuple[Float[Tensor, "B I J"], Float[Tensor, "B J d"], Float[Tensor, "B J"]]:
    """Coupling, z and agreement after ``rounds``; ``on`` is 1 for lower capsules that take part and 0 for others."""
    (lower, upper, d, e), W = W.shape, W.contiguous()
    shapes = (lower, upper), (upper, d), (upper,)
    results = tuple(x.new_empty(len(x), *shape) for shape in shapes)

    def run(rows: slice) -> None:
        block = [_lanes(x[rows]), _lanes(on[rows]), W, *(x.new_empty(*shape, _LANES) for shape in shapes)]
        if compiled(d, e)(*(each.data_ptr() for each in block), lower, upper, rounds, over_upper, sharpness):
            raise MemoryError(f"no memory to route to {upper} capsules")
        for result, found in zip(results, block[3:]):
            result[rows] = found.movedim(-1, 0)[: len(result[rows])]

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(run, (slice(start, start + _LANES) for start in range(0, len(x), _LANES))))
    return results


def _lanes(images: Float[Tensor, "n *axes"]) -> Float[Tensor, "*axes lanes"]:
    """Images side by side in the last axis, filled up with zeros."""
    return torch.nn.functional.pad(images.movedim(0, -1), (0, _LANES - len(images))).contiguous()
