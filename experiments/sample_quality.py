"""How good are the samples? Every model of the book, and those it must be compared with, by the same measures.

    python -m experiments.sample_quality --out capsnb/results/sample-quality.json
    python -m experiments.sample_quality --only sparse-fitted vae --out FILE
    python -m experiments.sample_quality --quick --out FILE      few samples of every row: only for checks

Every row draws 10,000 images and compares them with the 10,000 test images of MNIST, in the 64 features of the shipped
classifier, all divided by one number, so that their mean variance over the test images is 1. The row "training-images"
is the floor: real images against other real ones. The seed (--seed) draws the samples, the same for every row. A
finished row is written at once, and kept when the command runs again, unless the weights that it was made with have
changed since.

The JSON holds the measures (see capsnb.quality), and under "reference" those of the test images themselves. In it
"nearest_training" is the Euclidean distance in pixels from a sample to the nearest training image, the median over
1,000 samples. The safetensors file beside it holds pictures [.., 28, 28] of 8 bits: "NAME", the first 40 samples of a
row, and "NAME/neighbours", the training images nearest to the first 10; "test" are test images.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from capsnb import data, load_pretrained
from capsnb.baselines.capsnet import load_capsnet
from capsnb.baselines.capsule_network import CapsuleNetwork
from capsnb.baselines.pca import fit_pixel_gaussian
from capsnb.baselines.rbm import gibbs_step, hidden_probability, load_rbm, visible_probability
from capsnb.baselines.sparse_capsules import load_sparse_capsules
from capsnb.baselines.vae import load_vae
from capsnb.classifier import Classifier, load_classifier
from capsnb.pretrained import WEIGHTS
from capsnb.quality import class_measures, compare, nearest_neighbours
from capsnb.sampling import DOMAINS, Poses, sample_layers
from experiments import results
from experiments.common import as_bytes

SAMPLES, QUICK_SAMPLES = 10_000, 200
SHOWN, SHOWN_WITH_NEIGHBOURS = 40, 10
SEARCHED = 1000  # samples whose nearest training images are looked for
CHAINS, BURN_IN, APART = 1000, 1000, 100  # of the RBM: chains, steps before the first sample, steps between two
MODELS = {"paper": "mnist-paper", "dense": "mnist-dense", "sparse": "mnist"}
TABLE = ("fid", "kid", "precision", "recall", "density", "coverage", "confident")

Images = Float[Tensor, "N 1 28 28"]


class Row(NamedTuple):
    """The weight files that a row is made with, and how it draws so many images, given the training images."""

    weights: tuple[str, ...]
    draw: Callable[..., Images]


def real_images(count: int, train: Images, *, rng: torch.Generator) -> Images:
    """Training images, none of them twice."""
    return train[torch.randperm(len(train), generator=rng)[:count]]


def pixel_gaussian(components: int, count: int, train: Images, *, rng: torch.Generator) -> Images:
    """A Gaussian in the principal components of the training images."""
    return fit_pixel_gaussian(train, components).sample(count, rng=rng)


def gibbs_chains(count: int, train: Images, *, rng: torch.Generator) -> Images:
    """The visible units' probabilities in Gibbs chains of the RBM that start at noise, not at images.

    Each of 1,000 chains starts with every pixel on as often as the biases alone say, makes 1,000 steps, and then gives
    a picture every 100 steps. A picture is p(v = 1 given h), not a draw of v, whose pixels would be black or white.
    """
    rbm = load_rbm(WEIGHTS / "rbm.safetensors")
    v = torch.bernoulli(rbm.b.sigmoid().expand(min(CHAINS, count), -1), generator=rng)
    pictures = []
    for step in tqdm(range(BURN_IN + APART * -(-count // len(v))), desc="Gibbs steps", leave=False, mininterval=1.0):
        if step >= BURN_IN and step % APART == 0:
            h = torch.bernoulli(hidden_probability(rbm, v), generator=rng)
            pictures.append(visible_probability(rbm, h))
        v = gibbs_step(rbm, v, rng=rng)
    return torch.cat(pictures)[:count].view(-1, 1, 28, 28)


def vae_prior(count: int, train: Images, *, rng: torch.Generator) -> Images:
    """The VAE, from the Gaussian that it was trained to fill."""
    return load_vae().sample(count, rng=rng)


@torch.no_grad()
def vae_fitted(count: int, train: Images, *, rng: torch.Generator) -> Images:
    """The VAE, from a Gaussian with the mean and covariance of its latent numbers over 10,000 training images."""
    vae, images = load_vae(), real_images(SAMPLES, train, rng=rng)
    mean, log_variance = (torch.cat(parts) for parts in zip(*(vae.posterior(part) for part in images.split(250))))
    covariance = mean.T.cov() + log_variance.exp().mean(0).diag()
    noise = torch.randn(count, len(covariance), generator=rng)
    return vae.decode(mean.mean(0) + noise @ torch.linalg.cholesky(covariance).T)


def one_capsule(model: str, domain: str, count: int, train: Images, *, rng: torch.Generator) -> Images:
    """One capsule on, drawn as often as it wins training images, its pose drawn in ``domain``."""
    capsules = load_pretrained(model)
    return capsules.decode(sample_layers(count, capsules.poses, domain=domain, rng=rng))


def training_poses(model: str, count: int, train: Images, *, rng: torch.Generator) -> Images:
    """Reconstructions of training images: what the best density of poses could give, for it would draw such poses."""
    return load_pretrained(model).reconstruct(real_images(count, train, rng=rng))


def network_fitted(load: Callable[[], CapsuleNetwork], count: int, train: Images, *, rng: torch.Generator) -> Images:
    """As the fitted domain: poses like those that the longest capsule has in 10,000 training images, one capsule on."""
    network = load()
    codes = network.encode(real_images(SAMPLES, train, rng=rng))
    poses = Poses(*codes.shape[1:])
    poses.fit(codes)
    return network.decode(sample_layers(count, poses, domain="fitted", rng=rng))


CAPSULES = {
    f"{name}-{domain}": Row((model,), partial(one_capsule, model, domain))
    for name, model in MODELS.items()
    for domain in DOMAINS
}
ROWS = {
    "training-images": Row((), real_images),
    "pca-16": Row((), partial(pixel_gaussian, 16)),
    "pca-320": Row((), partial(pixel_gaussian, 320)),
    "rbm": Row(("rbm",), gibbs_chains),
    "vae": Row(("vae-mnist",), vae_prior),
    "vae-fitted": Row(("vae-mnist",), vae_fitted),
    "capsnet-fitted": Row(("capsnet-mnist",), partial(network_fitted, load_capsnet)),
    "sparsecaps-fitted": Row(("sparse-capsules-mnist",), partial(network_fitted, load_sparse_capsules)),
    **CAPSULES,
    "sparse-training-poses": Row(("mnist",), partial(training_poses, "mnist")),
}


def fingerprint(names: tuple[str, ...]) -> str:
    """What changes when a weight file of ``names`` does, or one that it shares a stage with, or the classifier's."""
    return results.fingerprint("classifier-mnist", *names)


class Real:
    """The real images, the classifier, and the test images' features with the number that they are divided by."""

    def __init__(self, train: Images, test: Images, classifier: Classifier):
        self.train, self.test, self.classifier = train, test, classifier
        self.features = classifier.features(test)
        self.scale = self.features.var(0).mean().sqrt()


def measure(samples: Images, real: Real, *, rng: torch.Generator) -> tuple[dict, dict[str, Tensor]]:
    """All measures of a row's samples, and its pictures by the end of their names."""
    features = real.classifier.features(samples)
    distances, rows = nearest_neighbours(samples[:SEARCHED].flatten(1), real.train.flatten(1))
    measures = compare(real.features / real.scale, features / real.scale, rng=rng)
    measures |= class_measures(real.classifier.classify(features)) | {"nearest_training": distances.median().item()}
    neighbours = real.train[rows[:SHOWN_WITH_NEIGHBOURS, 0]]
    return measures, {"": as_bytes(samples[:SHOWN]), "/neighbours": as_bytes(neighbours)}


def reference(real: Real) -> dict:
    """What the test images themselves measure, where that can be said without others."""
    distances, _ = nearest_neighbours(real.test[:SEARCHED].flatten(1), real.train.flatten(1))
    return class_measures(real.classifier.classify(real.features)) | {"nearest_training": distances.median().item()}


class Results(results.Results):
    """As for every experiment; a row is finished if it was made with the weights that are there now."""

    records = "rows"

    def holds(self, name: str) -> bool:
        return super().holds(name, fingerprint=fingerprint(ROWS[name].weights))


def run(found: Results, names: list[str]) -> None:
    """Draw, measure and write every row of ``names`` that ``found`` lacks."""
    train, test = (data.load("mnist", split, sample=found.quick)[0] for split in ("train", "test"))
    real, count = Real(train, test, load_classifier()), QUICK_SAMPLES if found.quick else SAMPLES
    found.content["reference"] = reference(real)
    print(f"{'':22s}{''.join(f'{title:>11s}' for title in TABLE)}  seconds")
    for name in names:
        if not found.holds(name):
            started, rng = time.monotonic(), torch.Generator().manual_seed(found.seed)
            made_with = fingerprint(ROWS[name].weights)
            measures, images = measure(ROWS[name].draw(count, train, rng=rng), real, rng=rng)
            record = {"fingerprint": made_with, "seconds": round(time.monotonic() - started, 1), **measures}
            pictures = {name + end: image for end, image in images.items()}
            found.add(name, record, {"test": as_bytes(test[:SHOWN])} | pictures)
        show(name, found.content["rows"][name])


def show(name: str, record: dict) -> None:
    """One line of the table."""
    print(f"{name:22s}{''.join(f'{record[key]:11.3g}' for key in TABLE)}{record['seconds']:9.0f}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    run(*results.command_line(__doc__, list(ROWS), arguments, Results))


if __name__ == "__main__":
    main()
