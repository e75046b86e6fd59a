"""The three stages of training, each a generator that yields after every update.

    for step in train_encoder(encoder, x, seed=0):
        print(step.loss)

Everything drawn at a step depends on the seed and the step's number alone, so a run that was interrupted and resumed
from its checkpoint ends with the same weights as one that was not (on a GPU up to the order in which sums are taken).

Several processes (see capsnb.distributed) share the rows of every batch and make the updates that one process would
make of them. Only dropout and views differ: each process draws its own for its part of the batch.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from capsnb import checkpoints, distributed, subspaces
from capsnb.capsules import squash
from capsnb.checks import require_choice, require_images
from capsnb.model import CapsuleDecoder, CapsuleEncoder, ConvAutoencoder
from capsnb.optim import OrthogonalMomentum

_SECONDS_BETWEEN_CHECKPOINTS = 30.0


@runtime_checkable
class Rows(Protocol):
    """Lower capsules before the squash: a tensor [N, I, e], or what gives rows [B, I, e] of one by their numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor) -> Tensor: ...


class Step(NamedTuple):
    """One update: its number (1 is the first), the number of all, the loss before it, the learning rate."""

    step: int
    steps: int
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class Plan:
    """How a module is minimised."""

    optimiser: torch.optim.Optimizer
    learning_rate: float
    steps: int
    batch: int
    warmup: int
    autocast: bool


def adam(network: nn.Module, images: int) -> Plan:
    """Adam in half precision for the epochs, the batch and the learning rate of the network's settings."""
    settings = network.settings
    optimiser = torch.optim.Adam(network.parameters(), settings.learning_rate)
    steps = max(1, round(settings.epochs * images / settings.batch))
    return Plan(optimiser, settings.learning_rate, steps, settings.batch, warmup=100, autocast=True)


def train_autoencoder(
    autoencoder: ConvAutoencoder, images: Float[Tensor, "N 1 28 28"], *, seed: int, checkpoint: Path | None = None
) -> Iterator[Step]:
    """Stage 1: fit the convolutional autoencoder by cross-entropy, then fix the empty image's code.  Section 4.1."""
    require_images(images)
    yield from minimise(autoencoder, (images,), adam(autoencoder, len(images)), seed=seed, checkpoint=checkpoint)
    autoencoder.centre()


def train_encoder(
    encoder: CapsuleEncoder, z_lower: Rows, *, seed: int, checkpoint: Path | None = None
) -> Iterator[Step]:
    """Stage 2: Algorithm 1 on lower capsules x = squash(``z_lower``), with the optimiser of the encoder's settings.

    If these have views, ``z_lower`` must be a capsnb.views.Views, or its like: rows of it are groups of views. If they
    have a start, W is replaced by it before the first update.
    """
    settings = encoder.settings
    if settings.start and not (checkpoint and checkpoint.exists()):
        start_from_subspaces(encoder, z_lower, seed=seed)
    batch = settings.batch // settings.views.learned if settings.views else settings.batch
    plan = Plan(_optimiser(encoder, settings), settings.learning_rate, settings.steps, batch, 50, False)
    yield from minimise(encoder, (z_lower,), plan, seed=seed, checkpoint=checkpoint, prepare=squash)


@torch.no_grad()
def start_from_subspaces(encoder: CapsuleEncoder, groups: Rows, *, seed: int) -> None:
    """Set W to the principal subspaces of the clusters that k-subspaces finds among some ``groups`` of lower capsules.

    Lower capsules are squashed, reduced to their principal directions and brought to length 1. Without views in the
    settings every row is a group of its own.
    """
    settings, start = encoder.settings, encoder.settings.start
    parts = batch_rows(len(groups), min(start.groups, len(groups)), 0, seed).split(50)

    def vectors_of(part: Tensor) -> Tensor:
        return squash(groups[part].to(encoder.W)).flatten(1)

    with seeded(seed, encoder.W.device):
        some = torch.cat([vectors_of(part) for part in parts[:10]])
        directions = subspaces.principal_directions(some, start.components)
        codes = [F.normalize(vectors_of(part) @ directions, dim=1) for part in parts]
    vectors = torch.cat(codes).unflatten(0, (-1, settings.views.count if settings.views else 1))
    options = {"clusters": settings.capsules, "dim": settings.dim, "tries": start.tries, "sweeps": start.sweeps}
    bases = subspaces.k_subspaces(vectors, **options, seed=seed).bases @ directions.T
    lower, upper, dim, e = encoder.W.shape
    encoder.W.copy_(start.length * bases.view(upper, dim, lower, e).permute(2, 0, 1, 3))


def train_decoder(
    decoder: CapsuleDecoder,
    capsules: Float[Tensor, "N J d"],
    z_lower: Rows,
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Step]:
    """Stage 3: learn U from the upper capsules and the lower ones they came from, by the rule of its settings.

    The "least-squares" rule is solved in one step; it needs images with one capsule on. Raises ValueError otherwise.
    """
    settings = decoder.settings
    if settings.rule == "least-squares":
        solve_decoder(decoder, capsules, z_lower)
        some = torch.arange(min(1000, len(capsules)))
        yield Step(1, 1, decoder(*(part[some].to(decoder.U) for part in (capsules, z_lower))).item(), 0.0)
        return
    plan = Plan(_optimiser(decoder, settings), settings.learning_rate, settings.steps, settings.batch, 50, False)
    yield from minimise(decoder, (capsules, z_lower), plan, seed=seed, checkpoint=checkpoint)


@torch.no_grad()
def solve_decoder(decoder: CapsuleDecoder, capsules: Float[Tensor, "N J d"], z_lower: Rows) -> None:
    """Set U to the ridge regression of the lower capsules on the pose of the one capsule that is on (so e_ji = 1)."""
    if (capsules.abs().amax(2) > 0).sum(1).max() > 1:
        raise ValueError("least squares needs one capsule on per image; use the 'gradient' or 'literal' rule instead")
    upper, lower, e, d = decoder.U.shape
    solution = ridge_regression(capsules.flatten(1).to(decoder.U), z_lower, ridge=decoder.settings.ridge)
    decoder.U.copy_(solution.view(upper, d, lower, e).permute(0, 2, 3, 1))


def ridge_regression(code: Float[Tensor, "N inputs"], target: Rows, *, ridge: float) -> Float[Tensor, "inputs outputs"]:
    """The matrix A that minimises ‖code A - target‖² + ``ridge`` (mean squared column length of code) ‖A‖².

    A row of ``target`` counts as one vector, in any precision. No intercept: a code of zeros stays zero.
    """
    gram = code.T @ code
    penalty = ridge * gram.diagonal().mean()
    moments = sum(code[rows].T @ target[rows].flatten(1).to(code) for rows in torch.arange(len(code)).split(1000))
    return torch.linalg.solve(gram + penalty * torch.eye(len(gram)).to(gram), moments)


def _optimiser(module: nn.Module, settings) -> torch.optim.Optimizer:
    require_choice(settings.optimiser, ("sgd", "adam", "orthogonal"), "optimiser")
    parameters, rate, decay = module.parameters(), settings.learning_rate, settings.weight_decay
    if settings.optimiser == "adam":
        return torch.optim.Adam(parameters, rate, weight_decay=decay)
    kind = torch.optim.SGD if settings.optimiser == "sgd" else OrthogonalMomentum
    return kind(parameters, rate, momentum=settings.momentum, weight_decay=decay)


def minimise(
    module: nn.Module,
    data: tuple[Rows, ...],
    plan: Plan,
    *,
    seed: int,
    checkpoint: Path | None,
    prepare: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Iterator[Step]:
    """Minimise ``module(*batch)``; yield after every update; save to and go on from ``checkpoint``.

    ``prepare`` is applied to every part of a batch. The module's ``settings``, a dataclass, must stay the same.
    """
    device = next(module.parameters()).device
    facts = {"settings": asdict(module.settings), "seed": seed, "rows": len(data[0])}
    distributed.require_same(**facts)
    kept = Checkpoint(checkpoint, facts)
    done = _resume(module, plan.optimiser, kept)

    def state() -> dict[str, Tensor]:
        return module.state_dict() | checkpoints.pack_optimiser(plan.optimiser)

    if not done:
        kept.write(0, plan.steps, state)
    parallel = distributed.parallel(module.train())
    for step in range(done, plan.steps):
        rate = plan.learning_rate * min(1, (step + 1) / plan.warmup) * (1 - step / plan.steps)
        for group in plan.optimiser.param_groups:
            group["lr"] = rate
        rows = distributed.own_part(batch_rows(len(data[0]), plan.batch, step, seed))
        with seeded(seed * 1_000_003 + step + (distributed.rank() << 24), device):
            batch = [prepare(part[rows].to(device).float()) for part in data]
            with autocast(device, plan.autocast):
                loss = parallel(*batch)
        mean_loss = distributed.mean(loss.detach()).item()  # the same in every process: all of them stop or none
        if not math.isfinite(mean_loss):
            raise ValueError(f"the loss is {mean_loss} at step {step + 1}; lower the learning rate and resume")
        plan.optimiser.zero_grad()
        loss.backward()
        plan.optimiser.step()
        kept.write(step + 1, plan.steps, state)
        yield Step(step + 1, plan.steps, mean_loss, rate)
    module.eval()


def batch_rows(count: int, batch: int, step: int, seed: int) -> Tensor:
    """The rows of the batch of ``step``: every epoch a new order of all rows, the incomplete last batch left out."""
    per_epoch = max(1, count // batch)
    epoch, place = divmod(step, per_epoch)
    return _order(count, seed * 1_000_003 + epoch)[place * batch : (place + 1) * batch]


@lru_cache(maxsize=1)
def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from ``seed`` inside, on the processor and on ``device``; leave the global generators of both as they were.

    Those of other accelerators of this machine keep the seed: each would set aside memory to be restored.
    """
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    with torch.random.fork_rng(devices, device_type=kind):
        torch.manual_seed(seed)
        yield


def autocast(device: torch.device, wanted: bool = True) -> torch.autocast:
    """bf16 autocast where the hardware has it, else nothing."""
    if device.type == "cuda":
        available = torch.cuda.get_device_capability(device) >= (8, 0)  # older ones only imitate it, slowly
    else:
        available = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted and available)


def _resume(module: nn.Module, optimiser: torch.optim.Optimizer, kept: "Checkpoint") -> int:
    """Load what was kept, if anything was; the number of steps that it holds.  Raises as ``Checkpoint.read``."""
    tensors, step = distributed.from_rank_0(kept.read)
    if tensors:
        module.load_state_dict({name: tensor for name, tensor in tensors.items() if not name.startswith("optimiser/")})
        checkpoints.unpack_optimiser(optimiser, tensors)
    return step


class Checkpoint:
    """The file that a training goes on from, if it has a ``path``; ``facts`` say whose it is."""

    def __init__(self, path: Path | None, facts: dict):
        self.path, self.facts, self.written = path, facts, time.monotonic()

    def read(self) -> tuple[dict[str, Tensor], int]:
        """Its tensors and their step; nothing and 0 if there is none.  Raises ValueError if it is another run's."""
        if self.path is None or not self.path.exists():
            return {}, 0
        tensors, found = checkpoints.read(self.path)
        for name, value in self.facts.items():
            if found.get(name) != value:
                raise ValueError(f"{self.path} was made with {name} {found.get(name)}, not {value}; use another folder")
        return tensors, found["step"]

    def write(self, step: int, steps: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Write what ``tensors`` gives: before the first step, after the last, in between twice a minute at most."""
        due = step in (0, steps) or time.monotonic() - self.written > _SECONDS_BETWEEN_CHECKPOINTS
        if self.path and distributed.rank() == 0 and due:
            checkpoints.write(self.path, tensors(), step=step, **self.facts)
            self.written = time.monotonic()
