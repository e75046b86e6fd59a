"""Train what expert capsules are judged by: the classifier whose features are compared, and the systems beside them.

    python -m experiments.yardsticks classifier --out capsnb/weights/classifier-mnist.safetensors
    python -m experiments.yardsticks vae --out capsnb/weights/vae-mnist.safetensors
    python -m experiments.yardsticks capsnet --out FILE          about two hours of one processor core
    python -m experiments.yardsticks sparse-capsules --out FILE  as long; dense-capsules is the same without the mask
    python -m experiments.yardsticks vae --quick --out FILE      few updates on the shipped sample: only for checks

All learn from the 60,000 training images of MNIST, the classifier and CapsNet from their labels too. The seed (--seed)
draws the first weights and everything later. Beside the weights, in 16 bits, a file NAME.metrics.json holds settings,
seconds, the curve, and what the finished network, in 16 bits, measures on the 10,000 test images. An interrupted run
goes on from NAME.checkpoint.safetensors when the command is given again.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from capsnb import checkpoints, data, runs
from capsnb.baselines.capsnet import CapsNet, CapsNetSettings, train_capsnet, winners
from capsnb.baselines.capsule_network import NetworkSettings, squared_error
from capsnb.baselines.sparse_capsules import SparseCapsules, SparseCapsulesSettings, train_sparse_capsules
from capsnb.baselines.vae import VAE, VAESettings, divergence, train_vae
from capsnb.classifier import Classifier, ClassifierSettings, train_classifier
from capsnb.evaluation import linear_probe, winner_measures
from capsnb.quality import CONFIDENT
from capsnb.training import Step
from experiments.ranking import ranks

CURVE_EVERY = 20  # updates between two points of the curve
QUICK_EPOCHS = 0.5
USED = 0.01  # nats of divergence from N(0, 1), a mean over images, above which a latent number counts as used


class Yardstick(NamedTuple):
    """A network with default settings, its training on images, labels, seed and checkpoint, and its measures.

    These are of the test images and labels, but ``measure`` is given the training images and labels before them.
    """

    make: Callable[..., nn.Module]
    settings: ClassifierSettings | VAESettings | NetworkSettings
    train: Callable[..., Iterator[Step]]
    measure: Callable[[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]], dict]


def measure_classifier(classifier: Classifier, images: Tensor, labels: Tensor) -> dict:
    """The share of images that are classified rightly, and of those that are so with a probability above 0.9."""
    probability, found = classifier.probabilities(images).max(1)
    right = found == labels
    confident = (probability > CONFIDENT).float().mean().item()
    return {"images": len(images), "accuracy": right.float().mean().item(), "confident": confident}


@torch.no_grad()
def measure_vae(vae: VAE, images: Tensor, labels: Tensor) -> dict:
    """The two parts of minus the ELBO in nats per image, one draw for each image, and how many numbers are used."""
    rng, sums = torch.Generator().manual_seed(0), torch.zeros(2)
    posteriors = [vae.posterior(part) for part in images.split(250)]
    for part in images.split(250):
        noise = torch.randn(len(part), vae.settings.latent, generator=rng)
        sums += torch.stack([term.sum() for term in vae.bound(part, noise)])
    mean, log_variance = (torch.cat(parts) for parts in zip(*posteriors))
    cross_entropy, total = (sums / len(images)).tolist()
    used = int((divergence(mean, log_variance).mean(0) > USED).sum())
    return {"images": len(images), "cross_entropy": cross_entropy, "divergence": total, "latent_numbers_used": used}


def measure_capsnet(capsnet: CapsNet, images: Tensor, labels: Tensor) -> dict:
    """The share of images whose longest capsule is the wrong one, and the squared error of what that one makes."""
    capsules = capsnet.encode(images)
    wrong = int((winners(capsules) != labels).sum())
    squares = squared_error(capsnet.reconstruct(capsules), images).mean().item()
    return {"images": len(images), "wrong": wrong, "error": wrong / len(images), "squared_error": squares}


def measure_sparse_capsules(
    network: SparseCapsules, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> dict:
    """What the masked capsules v' tell of the images, who wins and comes first, and a probe of v without the mask.

    "support" and "boosted" hold what Rawlinson 2018 plot in their figures 3 and 4, of the support and times its boost.
    """
    (known, known_labels), (images, labels) = train, test
    taught, latent = network.latent(known), network.latent(images)
    capsules = network.masked(latent)
    squares = torch.cat([squared_error(network.decode(c), x) for c, x in zip(capsules.split(250), images.split(250))])
    return {
        "images": len(images),
        "squared_error": squares.mean().item(),
        **winner_measures(capsules, labels),
        "linear_probe": linear_probe(network.masked(taught), known_labels, capsules, labels),
        "linear_probe_unmasked": linear_probe(taught.capsules, known_labels, latent.capsules, labels),
        "boost": network.lifetime.boost.tolist(),
        "support": ranks(latent.support),
        "boosted": ranks(network.lifetime.score(latent.support)),
    }


def on_test(measure: Callable[[nn.Module, Tensor, Tensor], dict]) -> Callable[..., dict]:
    """A measure that needs no training images."""
    return lambda network, train, test: measure(network, *test)


def without_labels(train: Callable[..., Iterator[Step]]) -> Callable[..., Iterator[Step]]:
    """Training that is given labels and does not look at them."""
    return lambda network, images, labels, **options: train(network, images, **options)


CAPSULES = Yardstick(
    SparseCapsules, SparseCapsulesSettings(), without_labels(train_sparse_capsules), measure_sparse_capsules
)
YARDSTICKS = {
    "classifier": Yardstick(Classifier, ClassifierSettings(), train_classifier, on_test(measure_classifier)),
    "vae": Yardstick(VAE, VAESettings(), without_labels(train_vae), on_test(measure_vae)),
    "capsnet": Yardstick(CapsNet, CapsNetSettings(), train_capsnet, on_test(measure_capsnet)),
    "sparse-capsules": CAPSULES,
    "dense-capsules": CAPSULES._replace(settings=SparseCapsulesSettings(gamma=0.0)),
}


def follow(updates: Iterator[Step], name: str, path: Path, facts: dict) -> dict:
    """Run ``updates`` to their end behind a progress bar; the curve and the seconds, kept in ``path`` on the way."""
    record = checkpoints.read_json(path) if path.exists() else facts | {"seconds": 0.0, "steps": [], "loss": []}
    started, before, bar = time.monotonic(), record["seconds"], tqdm(desc=name, mininterval=1.0)
    for step in updates:
        bar.total, bar.n = step.steps, step.step
        bar.update(0)
        if step.step % CURVE_EVERY == 0 or step.step == step.steps:
            keep = sum(done < step.step for done in record["steps"])  # a run that goes on repeats its last updates
            record["steps"] = [*record["steps"][:keep], step.step]
            record["loss"] = [*record["loss"][:keep], round(step.loss, 5)]
            record["seconds"] = round(before + time.monotonic() - started, 1)
            checkpoints.write_json(path, record)
    return record


def run(name: str, out: Path, *, quick: bool, seed: int) -> dict:
    """Train yardstick ``name`` and write it to ``out``; its metrics."""
    yardstick = YARDSTICKS[name]
    settings = replace(yardstick.settings, epochs=QUICK_EPOCHS) if quick else yardstick.settings
    train, test = (data.load("mnist", split, sample=quick) for split in ("train", "test"))
    facts = {"dataset": "mnist", "images": len(train[0]), "seed": seed, "quick": quick, "settings": asdict(settings)}
    checkpoint, metrics = (out.with_suffix(end) for end in (".checkpoint.safetensors", ".metrics.json"))
    if not checkpoint.exists():
        metrics.unlink(missing_ok=True)
    torch.manual_seed(seed)
    network = yardstick.make(settings)
    record = follow(yardstick.train(network, *train, seed=seed, checkpoint=checkpoint), name, metrics, facts)
    halves = {key: value.half() if value.is_floating_point() else value for key, value in network.state_dict().items()}
    network.load_state_dict(halves)
    record |= {"versions": runs.versions(), "test": yardstick.measure(network.eval(), train, test)}
    checkpoints.write(out, halves, **facts)
    checkpoints.write_json(metrics, record)
    checkpoint.unlink()
    return record


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=YARDSTICKS)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--quick", action="store_true", help="few updates on the shipped sample: for checks only")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    record = run(options.name, options.out, quick=options.quick, seed=options.seed)
    print(f"{options.name}: {record['test']}, {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
