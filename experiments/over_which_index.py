"""Over which index do the couplings sum to 1, and what else decides what experts learn? One choice changed at a time.

    python -m experiments.over_which_index --out capsnb/results/over-which-index.json
    python -m experiments.over_which_index --quick --out FILE      few updates on the shipped sample: only for checks
    python -m experiments.over_which_index --only dense sparse --out FILE

Stage 2 alone is trained, on the shipped MNIST autoencoder and all 60,000 training images; everything is measured on the
10,000 test images. The seed (--seed) draws the first weights and the batches, as in ``python -m capsnb train``, and the
sampled poses; all variants share it. A finished variant is written at once, and kept when the command runs again.

The JSON holds the measures. The safetensors file beside it holds pictures [.., 28, 28] of 8 bits: "digits", one test
image a class; for every variant NAME their reconstructions, "NAME/reconstruction", and "NAME", 4 samples of every
capsule alone. All are decoded by linear read-outs of the poses, made in the same way for sparse and dense variants:
reconstructions from all capsules together, samples from the one that is on.
"""

import time
from dataclasses import asdict, replace

from torch import Tensor

from capsnb import load_pretrained
from capsnb.model import ExpertCapsules
from capsnb.settings import PRESETS, EncoderSettings
from experiments.bases import BASES
from experiments.common import (
    QUICK_STEPS,
    as_bytes,
    encoded,
    fit,
    measure,
    one_of_each_class,
    show,
    show_titles,
    untrained,
)
from experiments.results import Results, command_line

CHANGES = {
    "": {},
    "-over-lower": {"over": "lower"},
    "-rounds-1": {"rounds": 1},
    "-rounds-5": {"rounds": 5},
    "-inner": {"agreement": "inner"},
    "-sharpness-10": {"sharpness": 10.0},
}
VARIANTS = {base + end: replace(BASES[base], **change) for base in BASES for end, change in CHANGES.items()}
# Couplings that sum to 1 over 576 capsules, not over 20, make small updates: the paper's preset takes larger steps.
VARIANTS["dense-over-lower-paper-rate"] = PRESETS["paper"].encoder


def train(name: str, chosen: EncoderSettings, stage1: ExpertCapsules, lower: Tensor, seed: int) -> ExpertCapsules:
    """A model with the autoencoder of ``stage1`` and an encoder trained on the ``lower`` capsules, as in ``runs``."""
    return fit(name, untrained(name, chosen, stage1, seed), lower, seed)


def run(results: Results, names: list[str]) -> None:
    """Train, measure and write every variant of ``names`` that ``results`` lacks; its seconds are those of training."""
    stage1, seed = load_pretrained("mnist"), results.seed
    train_split, test = (encoded(stage1, split, results.quick) for split in ("train", "test"))
    digits = {"digits": as_bytes(test.images[one_of_each_class(test.labels)])}
    show_titles()
    for name in names:
        chosen = replace(VARIANTS[name], steps=QUICK_STEPS) if results.quick else VARIANTS[name]
        if not results.holds(name, settings=asdict(chosen)):
            started = time.monotonic()
            model = train(name, chosen, stage1, train_split.lower, seed)
            record = {"settings": asdict(chosen), "seconds": round(time.monotonic() - started, 1)}
            record["measures"], images = measure(model, train_split, test, seed)
            results.add(name, record, digits | {name + end: image for end, image in images.items()})
        show(name, results.content["variants"][name])


def main(arguments: list[str] | None = None) -> None:
    run(*command_line(__doc__, list(VARIANTS), arguments))


if __name__ == "__main__":
    main()
