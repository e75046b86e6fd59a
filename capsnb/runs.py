"""A training run in a folder: what all systems share, and the three stages of expert capsules.

    stage1.safetensors  stage2.safetensors  stage3.safetensors   checkpoints, kept, so that --resume finds them
    model.safetensors                                            the finished model
    metrics.json                                                 seed, versions, settings, seconds, curves

Systems that are trained in one go have a checkpoint.safetensors instead: see capsnb.systems.
"""

import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import capsnb
from capsnb import checkpoints, distributed, training
from capsnb.capsules import squash
from capsnb.model import CapsuleEncoder, ExpertCapsules
from capsnb.pretrained import save_model
from capsnb.settings import Settings
from capsnb.views import Views

try:
    import resource
except ImportError:  # Windows
    resource = None

EXPERT_CAPSULES = "expert-capsules"
STAGES = (1, 2, 3)
_PARTS = {1: "autoencoder", 2: "encoder", 3: "decoder"}
_CURVE_EVERY = 10  # steps averaged into one point of a curve, of more than 3,000 as many as leave 300 points


@dataclass(frozen=True)
class Run:
    """One run: what is trained on which data, with which seed, into which folder."""

    settings: Settings | Any  # Any: those of another system
    dataset: str
    out: Path
    seed: int = 0
    device: str = "cpu"
    quick: bool = False
    system: str = EXPERT_CAPSULES

    def facts(self, images: int) -> dict:
        """What stays the same while the run goes on, for so many images."""
        facts = {"system": self.system, "dataset": self.dataset, "images": images, "seed": self.seed}
        return facts | {"quick": self.quick, "settings": asdict(self.settings)}


def train(run: Run, images: Tensor, *, stages: tuple[int, ...] = STAGES, resume: bool = False) -> ExpertCapsules:
    """Train ``stages`` of ``run`` on ``images``, going on from its checkpoints if ``resume``; returns the model.

    Raises FileExistsError when the folder holds such a stage already and ``resume`` is off, ValueError when it holds a
    run with other settings, FileNotFoundError when an earlier stage is missing.
    """
    distributed.require_same(settings=asdict(run.settings), seed=run.seed, stages=stages)
    begun = [f"stage {stage}" for stage in stages if _checkpoint(run, stage).exists()]
    metrics = distributed.from_rank_0(lambda: open_folder(run, len(images), begun, resume))
    metrics.setdefault("stages", {})
    torch.manual_seed(run.seed)
    model = ExpertCapsules(run.settings).to(run.device)
    encoded = Encoded(model, images.to(run.device))
    for stage in STAGES[: max(stages)]:
        if finished := distributed.from_rank_0(lambda: _finished(run, stage)):
            getattr(model, _PARTS[stage]).load_state_dict(finished)
        elif stage in stages:
            _train_stage(encoded, run, stage, metrics)
        else:
            raise FileNotFoundError(f"{run.out} has no finished stage {stage}; run it with --stage {stage}")
    if 3 in stages:
        _finish(encoded, run, metrics)
    return model.eval()


class Encoded:
    """What stages 1 and 2 make of ``images``, which lie where the model lies.

    Rows of it are stage 1's capsules z, [N, I, e], encoded whenever they are asked for: kept, they would take nearly
    six times the memory of the images.
    """

    def __init__(self, model: ExpertCapsules, images: Tensor):
        self.model, self.images = model, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.encode(self.images[rows])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Stage 1's capsules of any ``images``, in half precision where the hardware has it."""
        with training.autocast(images.device):
            return self.model.lower_preactivations(images).float()

    @property
    def lessons(self) -> training.Rows:
        """What stage 2 learns from: these rows, or groups of views if its settings have views."""
        views = self.model.settings.encoder.views
        return Views(self.images, self.encode, views) if views else self

    @cached_property
    def upper(self) -> Tensor:
        """The upper capsules [N, J, d] of all images, on the CPU; stage 2 must be finished."""
        return upper_capsules(self.model.eval().encoder, self)


@torch.no_grad()
def upper_capsules(encoder: CapsuleEncoder, z_lower: training.Rows) -> Tensor:
    """The upper capsules [N, J, d], on the CPU, of lower ones before the squash, a part of them at a time."""
    parts = (z_lower[rows].to(encoder.W) for rows in torch.arange(len(z_lower)).split(500))
    return torch.cat([encoder.encode(squash(part)).cpu() for part in parts])


def _train_stage(encoded: Encoded, run: Run, stage: int, metrics: dict) -> None:
    part, record = getattr(encoded.model.eval(), _PARTS[stage]), metrics["stages"].setdefault(str(stage), {})
    title, write = f"stage {stage}: {_PARTS[stage]}", partial(write_metrics, run, metrics)
    follow(_updates(encoded, run, stage), title, record, write)
    if distributed.rank() == 0:
        facts = {"finished": True, "settings": asdict(part.settings), "seed": run.seed}
        checkpoints.write(_checkpoint(run, stage), part.state_dict(), **facts)


def _updates(encoded: Encoded, run: Run, stage: int) -> Iterator[training.Step]:
    """The updates of ``stage``; encoding the images for it counts as its time too."""
    model, options = encoded.model, {"seed": run.seed, "checkpoint": _checkpoint(run, stage)}
    if stage == 1:
        yield from training.train_autoencoder(model.autoencoder, encoded.images, **options)
    elif stage == 2:
        yield from training.train_encoder(model.encoder, encoded.lessons, **options)
    else:
        yield from training.train_decoder(model.decoder, encoded.upper, encoded, **options)


def follow(steps: Iterator[training.Step], title: str, record: dict, write: Callable[[], None]) -> None:
    """Run ``steps`` to their end behind a progress bar, keeping curve, seconds and peak memory in ``record``.

    ``write`` writes it: at the end, and on the way twice a minute. In several processes, rank 0 does so for all.
    """
    if distributed.rank() > 0:
        for _ in steps:
            pass
        return
    for name, start in (("seconds", 0.0), ("steps", []), ("loss", [])):
        record.setdefault(name, start)
    started = written = time.monotonic()
    before, losses, bar = record["seconds"], [], None
    for step in steps:
        if bar is None:
            bar = tqdm(total=step.steps, initial=step.step - 1, desc=title, mininterval=1.0)
            keep = sum(done < step.step for done in record["steps"])
            record["steps"], record["loss"] = record["steps"][:keep], record["loss"][:keep]
        bar.update()
        losses.append(step.loss)
        if step.step % max(_CURVE_EVERY, step.steps // 300) == 0 or step.step == step.steps:
            record["steps"].append(step.step)
            record["loss"].append(round(sum(losses) / len(losses), 6))
            losses = []
            bar.set_postfix(loss=f"{record['loss'][-1]:.4f}")
        record["seconds"] = round(before + time.monotonic() - started, 1)
        if time.monotonic() - written > 30:
            write()
            written = time.monotonic()
    if bar is not None:
        bar.close()
    record["peak_memory_mb"] = peak_memory()
    write()


def _finish(encoded: Encoded, run: Run, metrics: dict) -> None:
    model = encoded.model.eval()
    model.poses.fit(encoded.upper)
    model.cpu()
    facts = {"dataset": run.dataset, "seed": run.seed, "quick": run.quick, "images": len(encoded.images)}
    if distributed.rank() == 0:
        save_model(model, run.out / "model.safetensors", **facts, versions=metrics["versions"])


def _checkpoint(run: Run, stage: int) -> Path:
    return run.out / f"stage{stage}.safetensors"


def _finished(run: Run, stage: int) -> dict[str, Tensor] | None:
    """The stage's weights if it is done; its file then says with which settings, which must be this run's."""
    if not _checkpoint(run, stage).exists():
        return None
    tensors, facts = checkpoints.read(_checkpoint(run, stage))
    wanted = asdict(getattr(run.settings, _PARTS[stage]))
    if facts["settings"] != wanted:
        raise ValueError(f"{run.out} holds stage {stage} with other settings; choose another --out")
    return tensors if facts.get("finished") else None


def open_folder(run: Run, images: int, begun: Sequence[str], resume: bool) -> dict:
    """The metrics of this run so far, after checking that what the folder holds belongs to it; ``begun`` names that."""
    if begun and not resume:
        raise FileExistsError(f"{run.out} holds {begun[0]} already; add --resume to go on, or change --out")
    path, facts = run.out / "metrics.json", run.facts(images)
    metrics = checkpoints.read_json(path) if path.exists() else {}
    for name, value in facts.items():
        if metrics.get(name, value) != value:
            raise ValueError(f"{run.out} holds a run with {name} {metrics[name]}, not {value}; choose another --out")
    return metrics | facts | {"versions": versions(), "device": run.device}


def write_metrics(run: Run, metrics: dict) -> None:
    """Write ``metrics.json`` of the run."""
    checkpoints.write_json(run.out / "metrics.json", metrics)


def peak_memory() -> int | None:
    """Megabytes that this process has held at most, so far; None on Windows, which does not tell."""
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes in which the system counts
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    return {"capsnb": capsnb.__version__, "torch": torch.__version__, "python": platform.python_version()}
