"""Capsules on S^m x R^n x (0, 1), the suggestion of section 4.2: do sizes leave the sphere, and do the negatives go?

    python -m experiments.product_capsules --out capsnb/results/product-capsules.json
    python -m experiments.product_capsules --quick --out FILE      few updates on the shipped sample: only for checks
    python -m experiments.product_capsules --only s15 s7-r8 --out FILE

Stage 1 is that of the shipped model without biases. Stage 2 is trained with the settings of plain sparse experts
(experiments.bases) on all 60,000 training images of MNIST; "s15" is the paper's space. Stage 3 is a ridge regression.
All spaces take 16 numbers a capsule. All is fitted on the training images and, but for samples, measured on the 10,000
test images. A finished variant is written at once, and kept when the command runs again.

The JSON holds the measures. The safetensors file beside it holds pictures of 8 bits, each column a capsule: for every
variant NAME its samples "NAME/DOMAIN" [3, 20, 28, 28], and "NAME/circle" and "NAME/line" [13, 20, 28, 28], the sweeps
described in product_measures.py.
"""

import hashlib
import time
from dataclasses import asdict, replace

import torch
from jaxtyping import Float
from torch import Tensor

from capsnb import load_pretrained
from capsnb.evaluation import winner_measures
from capsnb.model import ExpertCapsules
from capsnb.product_capsules import DOMAINS, ProductEncoder, Space
from capsnb.settings import EncoderSettings
from capsnb.strokes import MEASUREMENTS
from experiments import product_measures as measures
from experiments.bases import BASES
from experiments.common import QUICK_STEPS, Split, encoded, fit, variance_left
from experiments.results import Results, command_line

STAGE1 = "mnist-bias-free"  # the shipped model whose autoencoder is taken: the one that shows the paper's negatives
VARIANTS = {
    "s15": Space(sphere=16),
    "s7-r8": Space(),
    "s7-r8-even": Space(offset=0.0),
    "s1-r14": Space(sphere=2),
}
TABLE = ("capsules_in_use", "purity", "variance_left", "mean_direction")


def settings_of(quick: bool) -> EncoderSettings:
    """The settings of stage 2."""
    return replace(BASES["sparse"], steps=QUICK_STEPS) if quick else BASES["sparse"]


def facts(name: str, stage1: ExpertCapsules, quick: bool) -> dict:
    """All that decides the outcome of a variant but the seed."""
    content = b"".join(value.contiguous().numpy().tobytes() for value in stage1.autoencoder.state_dict().values())
    weights = hashlib.sha256(content).hexdigest()[:16]
    chosen = {"settings": asdict(settings_of(quick)), "space": asdict(VARIANTS[name])}
    return {**chosen, "stage1": STAGE1, "weights": weights}


def load(stage1: ExpertCapsules, quick: bool) -> tuple[list[Split], list[dict[str, Tensor]]]:
    """Training and test images after stage 1, and all that is measured on the images."""
    splits = [encoded(stage1, part, quick) for part in ("train", "test")]
    return splits, [{name: taken(split.images) for name, taken in MEASUREMENTS.items()} for split in splits]


def train(name: str, stage1: ExpertCapsules, lower: Float[Tensor, "N I e"], results: Results) -> ExpertCapsules:
    """A model with the autoencoder of ``stage1`` and an encoder for the variant's space, trained on ``lower``."""
    settings = settings_of(results.quick)
    torch.manual_seed(results.seed)
    model = ExpertCapsules(replace(stage1.settings, preset=name, encoder=settings))
    model.autoencoder = stage1.autoencoder
    model.encoder = ProductEncoder(*lower.shape[1:], settings, VARIANTS[name])
    return fit(name, model, lower, results.seed)


def measure(
    model: ExpertCapsules, splits: list[Split], strokes: list[dict[str, Tensor]], seed: int
) -> tuple[dict, dict[str, Tensor]]:
    """All measures of a trained variant, and its pictures.  Both lists hold training images first, then test images."""
    encoder, lower = model.encoder, splits[0].lower
    fitted, held_out = (measures.encode(encoder, split.lower) for split in splits)
    model.poses.fit(fitted.states)
    reader, plain = (measures.read_out(model, fitted.states, lower, activation=with_it) for with_it in (True, False))
    found, images = measures.sample_measures(reader, splits[0].images[:1000], seed=seed)
    swept = measures.sweeps(fitted.states, fitted.on, strokes[0]["area"], encoder.space)
    walks = {kind: reader.alone(states) for kind, states in swept.items()}
    code = reader.code(held_out.states).flatten(1)
    return {
        **winner_measures(held_out.states, splits[1].labels),
        "variance_left": variance_left(reader.matrix, code, splits[1].lower.flatten(1)),
        "samples": found,
        "samples_without_activation": measures.sample_measures(plain, splits[0].images[:1000], seed=seed)[0],
        "mean_direction": measures.mean_direction(fitted, encoder.space),
        "sign_known": measures.sign_known(held_out, encoder.space),
        "euclidean": measures.euclidean_measures(model.poses, encoder.space),
        "explained": measures.explained(fitted, held_out, strokes, encoder.space),
        "ink": {kind: measures.mean_ink(walk) for kind, walk in walks.items()},
    }, images | walks


def run(results: Results, names: list[str]) -> None:
    """Train, measure and write every variant of ``names`` that ``results`` lacks."""
    stage1, parts = load_pretrained(STAGE1), None
    print(f"{'':16s}{''.join(f'{title:>17s}' for title in TABLE)}  negatives: {', '.join(DOMAINS)}", flush=True)
    for name in names:
        known = facts(name, stage1, results.quick)
        if not results.holds(name, **known):
            parts = parts or load(stage1, results.quick)
            add(results, name, known, stage1, parts)
        show(name, results.content["variants"][name])


def add(
    results: Results, name: str, known: dict, stage1: ExpertCapsules, parts: tuple[list[Split], list[dict[str, Tensor]]]
) -> None:
    """Train, measure and write one variant; its seconds are those of training."""
    started = time.monotonic()
    model = train(name, stage1, parts[0][0].lower, results)
    seconds = round(time.monotonic() - started, 1)
    found, images = measure(model, *parts, results.seed)
    images = {f"{name}/{kind}": image for kind, image in images.items()}
    results.add(name, {**known, "seconds": seconds, "measures": found}, images)


def show(name: str, record: dict) -> None:
    """One line of the table."""
    found = record["measures"]
    negatives = "".join(f"{found['samples'][domain]['negative_share']:8.3f}" for domain in DOMAINS)
    print(f"{name:16s}{''.join(f'{found[key]:17.3g}' for key in TABLE)}  {negatives}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    run(*command_line(__doc__, list(VARIANTS), arguments))


if __name__ == "__main__":
    main()
