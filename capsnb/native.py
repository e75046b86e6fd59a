"""What is compiled for this processor when it is first needed: routing.c, which ``route`` runs on CPUs, and ``fused``.

Compiling routing.c takes a fraction of a second and every process does it anew, so nothing is left behind and nothing
can be stale. Where there is no compiler, or with CAPSNB_NATIVE=0 in the environment, all take the plain way.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

_LARGEST_LOGIT = 24  # sums of exponentials must stay above 1e-12; a round moves a logit by at most the sharpness
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")
_THREADS = (("-fopenmp",), ())  # with the threads that torch has, where the compiler can; else with one


@cache
def compiled(d: int, e: int) -> Callable[..., int] | None:
    """``route`` of routing.c for votes of ``d`` numbers from capsules of ``e``; None where it cannot be compiled."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get("CAPSNB_NATIVE") == "0":
        return None
    source = Path(__file__).with_name("routing.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "routing.so"
        for threads in _THREADS:
            command = [compiler, *_FLAGS, *threads, f"-DD={d}", f"-DE={e}", source, "-o", library, "-lm"]
            if subprocess.run(command, capture_output=True).returncode == 0:
                function = ctypes.CDLL(str(library)).route
                function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_long] * 3 + [ctypes.c_int] * 2 + [ctypes.c_float]
                return function
    return None


def can_route(x: Tensor, W: Tensor, rounds: int, sharpness: float = 1.0) -> bool:
    """Whether ``route`` can run here on these: single precision on a CPU, no derivative asked for, bounded logits."""
    here = x.device.type == W.device.type == "cpu"
    return here and is_plain(x, W, rounds, sharpness) and compiled(*W.shape[2:]) is not None


def is_plain(x: Tensor, W: Tensor, rounds: int, sharpness: float) -> bool:
    """Whether loops that store no votes can route these, on any device; see ``can_route``."""
    single = x.dtype == W.dtype == torch.float32
    derivative = torch.is_grad_enabled() and (x.requires_grad or W.requires_grad)
    bounded = (rounds - 1) * sharpness <= _LARGEST_LOGIT
    return single and not derivative and len(x) > 0 and bounded


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
    results = x.new_empty(batch, lower, upper), x.new_empty(batch, upper, d), x.new_empty(batch, upper)
    tensors = x.contiguous(), on.contiguous(), W.contiguous(), *results
    pointers = (tensor.data_ptr() for tensor in tensors)
    if compiled(d, e)(*pointers, batch, lower, upper, rounds, over_upper, sharpness):
        raise MemoryError(f"no memory to route to {upper} capsules")
    return results


def fused(function: Callable, *example) -> Callable:
    """``function`` with its passes over memory made into few by ``torch.compile``; itself where that is not possible.

    The first call, with ``example``, takes some ten seconds; so does every other shape of arguments later.
    """
    if os.environ.get("CAPSNB_NATIVE") == "0":
        return function
    fast = torch.compile(function, dynamic=False)
    try:
        fast(*example)
    except torch._dynamo.exc.TorchDynamoException as error:
        warnings.warn(f"torch.compile does not work here ({error}); the plain way is slower", stacklevel=2)
        return function
    return fast
