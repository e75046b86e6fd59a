"""The systems beside expert capsules: how each is made, trained, measured, stored and read.

A run of one is a folder:

    checkpoint.safetensors   while it is trained, so that --resume finds it
    model.safetensors        the finished network
    metrics.json             system, seed, versions, settings, seconds, curve
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from capsnb import checkpoints, data, distributed, measures, packing, runs
from capsnb.affine_mnist import in_frame
from capsnb.baselines.capsnet import CapsNet, CapsNetSettings, train_capsnet
from capsnb.baselines.capsule_network import LARGEST
from capsnb.baselines.matrix_capsules import LARGE, SHORT, EMRouting, EMRoutingSettings, train_em_routing
from capsnb.baselines.rbm import DigitRBM, DigitRBMSettings, train_digit_rbm
from capsnb.baselines.sparse_capsules import (
    DENSE,
    DENSE_FRAMES,
    FRAMES,
    SparseCapsules,
    SparseCapsulesSettings,
    train_sparse_capsules,
)
from capsnb.baselines.vae import VAE, VAESettings, train_vae
from capsnb.checks import require_labels
from capsnb.classifier import Classifier, ClassifierSettings, train_classifier
from capsnb.evaluation import CLASSES
from capsnb.measures import Labelled
from capsnb.pretrained import load_network
from capsnb.training import Step

QUICK_EPOCHS = 0.5
CHECKPOINT, MODEL = "checkpoint.safetensors", "model.safetensors"


class System(NamedTuple):
    """A network of given settings, its training, and its measures.

    ``train`` takes network, images and, if it uses ``labels``, these, a seed and a checkpoint. ``measure`` takes the
    network, training and test images with labels, and a random generator; what it says is of the test images.
    """

    about: str  # one line for --help, with the time that it takes
    presets: dict[str, Any]  # settings; the first are the default
    make: Callable[..., nn.Module]
    train: Callable[..., Iterator[Step]]
    measure: Callable[[nn.Module, Labelled, Labelled, torch.Generator], dict]
    labels: bool = False
    filters: tuple[str, ...] = ()  # parameters that a weight file to ship holds in 8 bits

    @property
    def default(self) -> Any:
        """The settings of the first preset."""
        return next(iter(self.presets.values()))


def _seen(network: SparseCapsules, images: Tensor, *labels: Tensor) -> tuple[Tensor, ...]:
    """The images in the frames of the network, and the labels."""
    return in_frame(images, network.settings.size), *labels


SYSTEMS = {
    "rbm": System(
        "restricted Boltzmann machine, by persistent contrastive divergence; about 6 minutes of a core",
        {"default": DigitRBMSettings()},
        DigitRBM,
        train_digit_rbm,
        lambda machine, train, test, rng: measures.measure_rbm(machine.rbm, train[0], test[0], rng=rng),
    ),
    "capsnet": System(
        "CapsNet with dynamic routing, learns from labels; about 2 hours of a core",
        {"default": CapsNetSettings()},
        CapsNet,
        train_capsnet,
        lambda capsnet, train, test, rng: measures.measure_capsnet(capsnet, *test),
        labels=True,
        filters=LARGEST,
    ),
    "em-routing": System(
        "matrix capsules with EM routing, learn from labels; about 1.5 hours of a core; 1 if small, 14 if large",
        {"short": SHORT, "small": EMRoutingSettings(), "large": LARGE},
        EMRouting,
        train_em_routing,
        lambda network, train, test, rng: measures.measure_em_routing(network, *test),
        labels=True,
    ),
    "sparse-capsules": System(
        "sparse unsupervised capsules, or dense ones; about 2 hours of a core; 1 in frames of 40 x 40",
        {"sparse": SparseCapsulesSettings(), "dense": DENSE, "sparse-frames": FRAMES, "dense-frames": DENSE_FRAMES},
        SparseCapsules,
        lambda network, images, **options: train_sparse_capsules(network, *_seen(network, images), **options),
        lambda network, train, test, rng: measures.measure_sparse_capsules(
            network, _seen(network, *train), _seen(network, *test)
        ),
        filters=LARGEST,
    ),
    "vae": System(
        "variational autoencoder around the filters of stage 1; about 15 minutes of a core",
        {"default": VAESettings()},
        VAE,
        train_vae,
        lambda vae, train, test, rng: measures.measure_vae(vae, test[0], rng=rng),
    ),
    "classifier": System(
        "no rival but the judge of their samples, learns from labels; about 2 minutes of a core",
        {"default": ClassifierSettings()},
        Classifier,
        train_classifier,
        lambda classifier, train, test, rng: measures.measure_classifier(classifier, *test),
        labels=True,
    ),
}


def train(run: runs.Run, images: Tensor, labels: Tensor, *, resume: bool = False) -> nn.Module:
    """Train the system of ``run``, going on from its checkpoint if ``resume``; returns it in evaluation mode.

    Raises FileExistsError when the folder holds a run already and ``resume`` is off, ValueError when that is another.
    """
    system = SYSTEMS[run.system]
    if system.labels:
        require_labels(labels, CLASSES)
    metrics = distributed.from_rank_0(lambda: _open(run, len(images), resume))
    torch.manual_seed(run.seed)
    network = system.make(run.settings).to(run.device)
    if finished := distributed.from_rank_0(lambda: _finished(run)):
        network.load_state_dict(finished)
    else:
        inputs = (images, labels) if system.labels else (images,)
        updates = system.train(network, *inputs, seed=run.seed, checkpoint=run.out / CHECKPOINT)
        runs.follow(updates, run.system, metrics, partial(runs.write_metrics, run, metrics))
        _finish(run, network, metrics)
    return network.eval().cpu()


def _open(run: runs.Run, images: int, resume: bool) -> dict:
    begun = ["a run"] if any((run.out / name).exists() for name in (CHECKPOINT, MODEL)) else []
    return runs.open_folder(run, images, begun, resume)


def _finished(run: runs.Run) -> dict[str, Tensor]:
    """The weights of the finished network; none if it is not."""
    return checkpoints.read(run.out / MODEL)[0] if (run.out / MODEL).exists() else {}


def _finish(run: runs.Run, network: nn.Module, metrics: dict) -> None:
    if distributed.rank() == 0:
        facts = run.facts(metrics["images"]) | {"versions": metrics["versions"]}
        checkpoints.write(run.out / MODEL, network.state_dict(), **facts)
        (run.out / CHECKPOINT).unlink()


def system_of(facts: dict) -> str:
    """The name of the system that a weight file with these ``facts`` holds; an old file is known by its settings."""
    names = set(facts.get("settings", {}))
    fitting = [name for name, system in SYSTEMS.items() if names and names <= set(asdict(system.default))]
    return facts.get("system") or next(iter(fitting), runs.EXPERT_CAPSULES)


def load(path: Path) -> tuple[System, nn.Module]:
    """The system that the weight file at ``path`` holds, and its network in evaluation mode on the CPU.

    Raises FileNotFoundError, or ValueError for another file.
    """
    system = SYSTEMS[system_of(checkpoints.read(path)[1])]
    return system, load_network(lambda content: system.make(type(system.default)(**content)), path)


def measure(path: Path, train: Labelled, test: Labelled, *, rng: torch.Generator) -> dict:
    """What the network in ``path`` is worth on the test images.  Raises FileNotFoundError, or ValueError."""
    system, network = load(path)
    return system.measure(network, train, test, rng)


def export(folder: Path, out: Path) -> dict:
    """Write the network of a finished run as it ships, in 16 bits and its largest filters in 8; its metrics.

    These lie beside it, with what the network as it is stored there measures on the test images under "test".
    """
    tensors, facts = checkpoints.read(folder / MODEL)
    metrics, name = checkpoints.read_json(folder / "metrics.json"), system_of(facts)
    small = packing.shrunk(packing.restored(tensors), SYSTEMS[name].filters)
    checkpoints.write(out, small, **facts | {"system": name})
    sample = True if facts["quick"] and data.has_sample(facts["dataset"]) else None
    splits = (data.load(facts["dataset"], split, sample=sample) for split in ("train", "test"))
    metrics |= {"system": name, "test": measure(out, *splits, rng=torch.Generator().manual_seed(0))}
    checkpoints.write_json(out.with_suffix(".metrics.json"), metrics)
    return metrics
