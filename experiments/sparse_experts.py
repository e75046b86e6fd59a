"""What does each part of the sparse experts do? One part is removed, replaced or added at a time.

    python -m experiments.sparse_experts --out capsnb/results/sparse-experts.json
    python -m experiments.sparse_experts --quick --out FILE      few updates on the shipped sample: only for checks
    python -m experiments.sparse_experts --only base no-mask --out FILE

There are two bases. "base" are plain sparse experts with the preset's sharpness, without what divides the images among
the capsules in other ways than by competition; its variants take the competition apart. "preset" is the preset "sparse"
whole; its variants do without one of the things that it adds. Stage 2 alone is trained, on the shipped MNIST
autoencoder and all 60,000 training images; everything is measured on the 10,000 test images. The seed (--seed) draws
the first weights, the batches and the views; all variants share it. The preset with the seed of the model that ships is
that model, and not trained again. A finished variant is written at once, and kept when the command runs again, unless
its settings or the shipped weights that it is made with have changed since.

The JSON holds the measures, and under "shipped" what Rawlinson 2018 plot in their figures 3 and 4, of the dense and the
sparse model that ship with the book. The safetensors file beside it holds the pictures of ``experiments.common``:
"digits", one test image a class; for every variant NAME their reconstructions, "NAME/reconstruction", and "NAME", 4
samples of every capsule alone.
"""

import time
from dataclasses import asdict, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsnb import checkpoints, load_pretrained, runs, squash
from capsnb.evaluation import ranks
from capsnb.model import ExpertCapsules
from capsnb.pretrained import WEIGHTS
from capsnb.settings import PRESETS, EncoderSettings, quick
from capsnb.sparsity import explanation, support
from capsnb.training import Rows
from capsnb.views import Views
from experiments.bases import BASES
from experiments.common import (
    QUICK_STEPS,
    Split,
    as_bytes,
    encoded,
    fit,
    measure,
    one_of_each_class,
    show,
    show_titles,
    untrained,
)
from experiments.ranking import POSITIONS, AblatedEncoder, Variant
from experiments.results import Results, command_line, digest

WHOLE, DENSE = PRESETS["sparse"].encoder, PRESETS["dense"].encoder
BASE = replace(BASES["sparse"], sharpness=WHOLE.sharpness)
PLAIN = BASE.sparsity
# Another optimiser needs a rate of its own: that of the preset "dense", and the one with which Adam trains its stage 3.
SGD = {name: getattr(DENSE, name) for name in ("optimiser", "learning_rate", "momentum", "weight_decay")}
ADAM = {name: getattr(PRESETS["dense"].decoder, name) for name in ("optimiser", "learning_rate", "weight_decay")}
VARIANTS = {
    "base": Variant(BASE),
    "no-mask": Variant(replace(BASE, sparsity=None)),
    "no-boost": Variant(replace(BASE, sparsity=replace(PLAIN, boost_step=0.0))),
    "constant-gamma": Variant(replace(BASE, sparsity=replace(PLAIN, gamma_first=PLAIN.gamma_last))),
    "not-shared-out": Variant(BASE, shared_out=False),
    "by-length": Variant(BASE, score="length"),
    "by-support": Variant(BASE, score="support"),
    "by-agreement": Variant(BASE, score="agreement"),
    "by-standardised": Variant(BASE, score="standardised"),
    "sgd": Variant(replace(BASE, **SGD)),
    "adam": Variant(replace(BASE, **ADAM)),
    "conscience": Variant(replace(BASE, sparsity=replace(PLAIN, conscience=WHOLE.sparsity.conscience))),
    "preset": Variant(WHOLE),
    "preset-no-views": Variant(replace(WHOLE, views=None)),
    "preset-no-conscience": Variant(replace(WHOLE, sparsity=replace(WHOLE.sparsity, conscience=0.0))),
    "preset-no-start": Variant(replace(WHOLE, start=None)),
}
SHIPPED = {"dense": "mnist-dense", "sparse": "mnist"}


class Lessons:
    """What variants learn from: the lower capsules of the training images, or groups of views of these images."""

    def __init__(self, stage1: ExpertCapsules, train: Split):
        self.lower, self.encoded = train.lower, runs.Encoded(stage1, train.images)

    @cached_property
    def views(self) -> Views:
        """Once for all variants, for the search of neighbours takes a minute."""
        return Views(self.encoded.images, self.encoded.encode, WHOLE.views)

    def of(self, settings: EncoderSettings) -> Rows:
        """The rows that an encoder with these ``settings`` is trained on."""
        if settings.views:
            return self.views
        return self.encoded if settings.start else self.lower  # 16 bits are too few for the clustering


def build(name: str, variant: Variant, stage1: ExpertCapsules, unit: float, seed: int) -> ExpertCapsules:
    """A model to be trained, with the autoencoder of ``stage1``; where it can be, its encoder is the library's own."""
    model = untrained(name, variant.settings, stage1, seed)
    if variant != Variant(variant.settings):
        model.encoder = AblatedEncoder(model.encoder, variant, unit)
    return model


def ships(variant: Variant, stage1: ExpertCapsules, seed: int) -> bool:
    """Whether the shipped model whose stage 1 all share was itself trained as ``variant`` with this seed."""
    shipped = checkpoints.read_json(WEIGHTS / "mnist.metrics.json")
    return variant == Variant(stage1.settings.encoder) and seed == shipped["seed"]


def train(
    name: str, variant: Variant, stage1: ExpertCapsules, rows: Rows, unit: float, seed: int
) -> ExpertCapsules:
    """The model of a ``variant`` after training on ``rows``."""
    if ships(variant, stage1, seed):
        return stage1
    return fit(name, build(name, variant, stage1, unit, seed), rows, seed)


def facts_of(variant: Variant, stage1: ExpertCapsules, seed: int) -> dict:
    """What decides the outcome of a ``variant``: how it is trained, and what it takes from the shipped model."""
    parts = ("autoencoder", "encoder") if ships(variant, stage1, seed) else ("autoencoder",)
    taken = {part: fingerprint(getattr(stage1, part)) for part in parts}
    return variant._asdict() | {"settings": asdict(variant.settings)} | taken


def shortened(variant: Variant) -> Variant:
    """The same ``variant`` with few updates and a small start, for checks."""
    small = quick(replace(PRESETS["sparse"], encoder=variant.settings)).encoder
    return variant._replace(settings=replace(small, steps=QUICK_STEPS))


def score_unit(model: ExpertCapsules, lower: Float[Tensor, "N I e"]) -> float:
    """How much the explanation of a trained ``model`` deviates from capsule to capsule, a mean over 1,000 images."""
    with torch.no_grad():
        return explanation(squash(lower[:1000].float()), model.encoder.W).std(1).mean().item()


@torch.no_grad()
def shipped_ranks(model: ExpertCapsules, test: Split) -> dict[str, dict]:
    """Ranks by coupling support and by explanation, before any capsule is turned off.  Rawlinson 2018, figs. 3, 4."""
    found = {"support": [], "explanation": []}
    for part in test.lower.split(250):
        x = squash(part.float())
        found["support"].append(support(model.encoder.route(x).coupling, POSITIONS))
        found["explanation"].append(explanation(x, model.encoder.W))
    return {name: ranks(torch.cat(scores)) for name, scores in found.items()}


def fingerprint(module: nn.Module) -> str:
    """Twelve letters that change when a weight does."""
    return digest(module.state_dict().values())[:12]


def run_shipped(results: Results) -> None:
    """Measure and write the ranks of the shipped models, unless ``results`` has those of these very weights."""
    done = results.content.setdefault("shipped", {})
    for name, weights in SHIPPED.items():
        model = load_pretrained(weights)
        facts = {"weights": fingerprint(model)}
        if done.get(name, {}).get("weights") != facts["weights"]:
            done[name] = facts | shipped_ranks(model, encoded(model, "test", results.quick))
            results.write()


def run(results: Results, names: list[str]) -> None:
    """Train, measure and write every variant of ``names`` that ``results`` lacks; its seconds are those of training."""
    stage1, seed = load_pretrained("mnist"), results.seed
    train_split, test = (encoded(stage1, split, results.quick) for split in ("train", "test"))
    unit, lessons = score_unit(stage1, train_split.lower), Lessons(stage1, train_split)
    digits = {"digits": as_bytes(test.images[one_of_each_class(test.labels)])}
    show_titles()
    for name in names:
        variant = shortened(VARIANTS[name]) if results.quick else VARIANTS[name]
        facts = facts_of(variant, stage1, seed)
        if not results.holds(name, **facts):
            rows, started = lessons.of(variant.settings), time.monotonic()
            model = train(name, variant, stage1, rows, unit, seed)
            record = facts | {"score_unit": unit, "seconds": round(time.monotonic() - started, 1)}
            record["measures"], images = measure(model, train_split, test, seed)
            results.add(name, record, digits | {name + end: image for end, image in images.items()})
        show(name, results.content["variants"][name])


def main(arguments: list[str] | None = None) -> None:
    results, names = command_line(__doc__, list(VARIANTS), arguments)
    run_shipped(results)
    run(results, names)


if __name__ == "__main__":
    main()
