"""Training in several processes that torchrun started, on one machine or many.

    torchrun --nproc-per-node 2 -m capsnb train --dataset mnist --out runs/mnist

Every process has a rank, holds the whole model and takes its part of every batch; DistributedDataParallel averages the
gradients. Files are read and written by rank 0 alone, which sends what it read to the others: they need no common
folder, and what hangs on a file (is this stage finished?) is decided once for all. In a single process every function
here gives back what it got, at no cost.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from capsnb.checks import require_choice

Result = TypeVar("Result")

_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@contextmanager
def processes(device: str) -> Iterator[None]:
    """Join the other processes that torchrun started, for the length of a block that computes on ``device``.

    Raises ValueError for a device through which processes cannot exchange tensors.
    """
    if not _launched():
        yield
        return
    kind = torch.device(device).type
    require_choice(kind, _BACKENDS, "device for several processes")
    if kind == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(_BACKENDS[kind])
    yield
    distributed.destroy_process_group()  # not after an error: it would wait for processes that may never come here


def own_device(name: str) -> str:
    """``name``, but where torchrun started several processes "cuda" becomes the GPU that is this process's own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" and _launched() else name


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process among them; rank 0 alone reads, writes and prints."""
    return distributed.get_rank() if world_size() > 1 else 0


def parallel(module: nn.Module) -> nn.Module:
    """``module`` so wrapped that ``backward`` leaves the mean gradient of all processes, from the weights of rank 0."""
    return DistributedDataParallel(module) if world_size() > 1 else module


def own_part(rows: Tensor) -> Tensor:
    """This process's part of the rows of a batch.  Raises ValueError unless all parts are equally long.

    With equal parts the mean over processes of a mean over rows is the mean over the whole batch.
    """
    if len(rows) % world_size():
        raise ValueError(
            f"a batch of {len(rows)} images cannot be shared equally among {world_size()} processes; "
            f"start a number of processes that divides {len(rows)}"
        )
    return rows.chunk(world_size())[rank()]


def mean(value: Tensor) -> Tensor:
    """The mean of ``value`` over all processes."""
    if world_size() == 1:
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / world_size()


def from_rank_0(compute: Callable[[], Result]) -> Result:
    """What ``compute()`` gives in rank 0; the ValueError or OSError that it raises there is raised everywhere."""
    if world_size() == 1:
        return compute()
    result = error = None
    if rank() == 0:
        try:
            result = compute()
        except (ValueError, OSError) as caught:
            error = caught
    answer = [result, error]
    distributed.broadcast_object_list(answer)
    result, error = answer
    if error:
        raise error
    return result


def require_same(**facts) -> None:
    """Raise ValueError in every process if a fact is not the same in all of them."""
    if world_size() == 1:
        return
    everywhere = [None] * world_size()
    distributed.all_gather_object(everywhere, facts)
    for name in facts:
        values = [others[name] for others in everywhere]
        if values.count(values[0]) < len(values):
            raise ValueError(f"{name} differs between processes: {values}; start all with the same options and data")
