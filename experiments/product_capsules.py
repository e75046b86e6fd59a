"""Capsules on S^m x R^n x (0, 1), the suggestion of section 4.2: do sizes leave the sphere, and do the negatives go?

    python -m experiments.product_capsules --out capsnb/results/product-capsules.json
    python -m experiments.product_capsules --quick --out FILE      few updates on the shipped sample: only for checks
    python -m experiments.product_capsules --only s15 s7-r8 --out FILE

Stage 1 is that of a shipped model. Stage 2 is trained with its settings on all 60,000 training images of MNIST; where
there is a sphere only, the shipped one is taken. Stage 3 is a ridge regression. All spaces take 16 numbers a capsule.
All is fitted on the training images and, but for samples, measured on the 10,000 test images. A finished variant is
written at once, and kept when the command runs again.

The JSON holds the measures. The safetensors file beside it holds pictures of 8 bits, each column a capsule: for every
variant "NAME", samples [3, 20, 28, 28] of the complete domain, "NAME/DOMAIN" of the others, and "NAME/circle" and
"NAME/line" [13, 20, 28, 28], the sweeps described in product_measures.py.
"""

import argparse
import functools
import hashlib
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from capsnb import data, load_pretrained, runs
from capsnb.evaluation import winner_measures
from capsnb.model import ExpertCapsules
from capsnb.product_capsules import ProductEncoder, Space, euclidean_deviation, split
from capsnb.sampling import Poses
from capsnb.settings import EncoderSettings
from capsnb.strokes import MEASUREMENTS, area
from capsnb.training import train_encoder
from experiments import product_measures as measures
from experiments.over_which_index import Results


@dataclass(frozen=True)
class Variant:
    """The shipped model that lends its stage 1 and its settings, and the space of the capsules."""

    stage1: str
    space: Space


VARIANTS = {
    "s15": Variant("mnist-bias-free", Space(sphere=16)),
    "s7-r8": Variant("mnist-bias-free", Space()),
    "s7-r8-even": Variant("mnist-bias-free", Space(offset=0.0)),
    "s1-r14": Variant("mnist-bias-free", Space(sphere=2)),
    "centred-s7-r8": Variant("mnist", Space()),
    "centred-s15": Variant("mnist", Space(sphere=16)),
}
QUICK_UPDATES = 5
TABLE = ("capsules_in_use", "purity", "variance_left", "mean_direction")


@dataclass(frozen=True)
class Chosen:
    """All that decides the outcome of a variant but the seed."""

    encoder: EncoderSettings
    space: Space
    stage1: str
    fingerprint: str


class Part(NamedTuple):
    """A split of the data set, what is measured on its images, and stage 1's capsules before the squash, in 16 bits."""

    images: Float[Tensor, "N 1 28 28"]
    labels: Int[Tensor, "N"]
    strokes: dict[str, Float[Tensor, "N"]]
    lower: Float[Tensor, "N I e"]


def train(name: str, chosen: Chosen, model: ExpertCapsules, lower: Tensor, seed: int) -> ProductEncoder:
    """An encoder for the space of the variant ``name``, trained on the ``lower`` capsules.

    Without Euclidean numbers that is the paper's encoder, and the one that ships with stage 1 is taken as it is.
    """
    torch.manual_seed(seed)
    encoder = ProductEncoder(*lower.shape[1:], chosen.encoder, chosen.space)
    if chosen.space.sphere == chosen.encoder.dim:
        encoder.load_state_dict(model.encoder.state_dict())
        return encoder.eval()
    updates = train_encoder(encoder, lower, seed=seed)
    for _ in tqdm(updates, desc=name, total=chosen.encoder.steps, leave=False, mininterval=1.0):
        pass
    return encoder.eval()


def fingerprint(*modules: nn.Module) -> str:
    """A short name for the shipped weights that a variant takes: with others, its results are no longer theirs."""
    content = b"".join(value.numpy().tobytes() for module in modules for value in module.state_dict().values())
    return hashlib.sha256(content).hexdigest()[:12]


def measure(
    model: ExpertCapsules, encoder: ProductEncoder, train_part: Part, test: Part, seed: int
) -> tuple[dict, dict[str, Tensor]]:
    """All measures of a trained variant, and its pictures by what comes behind its name."""
    space, count = encoder.space, encoder.settings.capsules
    fitted, held_out = (measures.encode(encoder, part.lower) for part in (train_part, test))
    poses = Poses(count, encoder.settings.dim)
    poses.fit(fitted.states)
    readers = {
        key: measures.read_out(model, fitted.states, train_part.lower, space, activation=key == "samples")
        for key in ("samples", "samples_without_activation")
    }
    found, images = {}, {}
    for key, reader in readers.items():
        found[key], drawn = measures.sample_measures(reader, poses, train_part.images[:1000], seed=seed)
        images |= {f"/{domain}": part for domain, part in drawn.items()} if key == "samples" else {}
    swept = measures.sweeps(fitted.states, fitted.on, train_part.strokes["area"], space)
    walks = {kind: readers["samples"].alone(layers) for kind, layers in swept.items()}
    found |= {
        **winner_measures(held_out.states, test.labels),
        "variance_left": measures.variance_left(readers["samples"], held_out.states, test.lower),
        "mean_direction": mean_direction(poses, space),
        "euclidean": euclidean_measures(poses, space),
        "explained": measures.explained(fitted, held_out, (train_part.strokes, test.strokes), space),
        "ink": {kind: [area(rows.unsqueeze(1)).mean().item() for rows in walk] for kind, walk in walks.items()},
    }
    images |= {f"/{kind}": measures.as_bytes(walk) for kind, walk in walks.items()}
    return found, {end.removeprefix("/complete"): image for end, image in images.items()}


def mean_direction(poses: Poses, space: Space) -> float:
    """Length of a capsule's mean point on its sphere, over capsules by share: 0 is all around, 1 a single point."""
    length = torch.linalg.vector_norm(split(poses.mean, space)[0], dim=1)
    return ((poses.share * length).sum() / poses.share.sum()).item()


def euclidean_measures(poses: Poses, space: Space) -> dict[str, float]:
    """Where r lies in training: its mean on the offset's axis and off it, over capsules by share, and its deviation."""
    mean, share = split(poses.mean, space)[1], poses.share / poses.share.sum()
    return {
        "mean_on_axis": (share * mean[:, :1].sum(1)).sum().item(),
        "mean_off_axis": (share * torch.linalg.vector_norm(mean[:, 1:], dim=1)).sum().item(),
        "deviation": euclidean_deviation(poses, space).item(),
    }


@functools.cache
def measured(split_name: str, quick: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A split of MNIST and all that is measured on its images; quick runs take the shipped sample, others never do."""
    images, labels = data.load("mnist", split_name, sample=quick)
    return images, labels, {name: taken(images) for name, taken in MEASUREMENTS.items()}


def encoded(model: ExpertCapsules, split_name: str, quick: bool) -> Part:
    """A split of MNIST after stage 1 of ``model``."""
    images, labels, strokes = measured(split_name, quick)
    rows = runs.Encoded(model, images)
    lower = torch.cat([rows[part].half() for part in torch.arange(len(images)).split(500)])
    return Part(images, labels, strokes, lower)


def run(results: Results, names: list[str], *, quick: bool, seed: int) -> None:
    """Train, measure and write every variant of ``names`` that ``results`` lacks, one stage 1 after the other."""
    print(f"{'':16s}{''.join(f'{title:>17s}' for title in TABLE)}  negatives: {', '.join(measures.DOMAINS)}")
    for stage1 in dict.fromkeys(VARIANTS[name].stage1 for name in names):
        model, parts = load_pretrained(stage1), []
        for name in (name for name in names if VARIANTS[name].stage1 == stage1):
            chosen = settings_of(name, model, quick)
            if not results.holds(name, chosen):
                parts = parts or [encoded(model, part, quick) for part in ("train", "test")]
                add(results, name, chosen, model, parts, seed)
            show(name, results.content["variants"][name]["measures"])


def settings_of(name: str, model: ExpertCapsules, quick: bool) -> Chosen:
    """What the variant would be trained with now."""
    encoder, variant = model.settings.encoder, VARIANTS[name]
    sphere_only = variant.space.sphere == encoder.dim
    taken = (model.autoencoder, model.encoder) if sphere_only else (model.autoencoder,)
    encoder = replace(encoder, steps=QUICK_UPDATES) if quick else encoder
    return Chosen(encoder, variant.space, variant.stage1, fingerprint(*taken))


def add(results: Results, name: str, chosen: Chosen, model: ExpertCapsules, parts: list[Part], seed: int) -> None:
    """Train, measure and write one variant; its seconds are those of training."""
    started = time.monotonic()
    encoder = train(name, chosen, model, parts[0].lower, seed)
    record = {"settings": asdict(chosen), "seconds": round(time.monotonic() - started, 1)}
    record["measures"], images = measure(model, encoder, *parts, seed)
    results.add(name, record, {name + end: image for end, image in images.items()})


def show(name: str, found: dict) -> None:
    """One line of the table."""
    negatives = "".join(f"{found['samples'][domain]['negative_share']:8.3f}" for domain in measures.DOMAINS)
    print(f"{name:16s}{''.join(f'{found[key]:17.3g}' for key in TABLE)}  {negatives}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or to go on with")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME", help=f"of: {', '.join(VARIANTS)}")
    parser.add_argument("--quick", action="store_true", help="few updates on the shipped sample: for checks only")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        results = Results(options.out, options.quick, options.seed)
    except ValueError as error:
        parser.error(str(error))
    run(results, options.only or list(VARIANTS), quick=options.quick, seed=options.seed)


if __name__ == "__main__":
    main()
