"""What does each part of the sparse experts do? One part of their competition is removed, replaced or added at a time.

    python -m experiments.sparse_experts --out capsnb/results/sparse-experts.json
    python -m experiments.sparse_experts --quick --out FILE      few updates on the shipped sample: only for checks
    python -m experiments.sparse_experts --only base no-mask --out FILE

The base is the preset "sparse" without its views, start from k-subspaces and conscience, which divide the images among
the capsules in other ways than by the competition that is taken apart here. Stage 2 alone is trained, shortly, on the
shipped MNIST autoencoder and batches drawn from the 60,000 training images; everything is measured on the 10,000 test
images. The seed (--seed) draws the first weights and the batches; all variants share it. A finished variant is written
at once, and kept when the command runs again, unless its settings or stage 1 have changed since.

The JSON holds the measures, and under "shipped" what Rawlinson 2018 plot in their figures 3 and 4, of the dense and the
sparse model that ship with the book. The safetensors file beside it holds the pictures of ``experiments.common``:
"digits", one test image a class; for every variant NAME their reconstructions, "NAME/reconstruction", and "NAME", 4
samples of every capsule alone.
"""

import hashlib
import time
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from capsnb import load_pretrained, squash
from capsnb.model import GRID, CapsuleEncoder, ExpertCapsules
from capsnb.routing import RoutingState
from capsnb.settings import PRESETS, EncoderSettings
from capsnb.sparsity import explanation, share_out
from experiments.bases import BASES
from experiments.common import (
    QUICK_STEPS,
    Results,
    Split,
    as_bytes,
    command_line,
    encoded,
    fit,
    measure,
    one_of_each_class,
    show,
    show_titles,
)


class Variant(NamedTuple):
    """What is trained: settings, what capsules are ranked by, whether masked couplings are made to sum to 1 again."""

    settings: EncoderSettings
    score: str = "explanation"
    shared_out: bool = True


WHOLE, DENSE = PRESETS["sparse"].encoder, PRESETS["dense"].encoder
BASE = replace(BASES["sparse"], sharpness=WHOLE.sharpness, steps=400, batch=64)  # short: there are many variants
PLAIN = BASE.sparsity
READ_OUT = 20_000  # training images for the read-outs and the probe
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
}
SHIPPED = {"dense": "mnist-dense", "sparse": "mnist"}
MEMORY = 0.99  # of the running mean and deviation in the standardised agreement


def support(coupling: Float[Tensor, "B I J"]) -> Float[Tensor, "B J"]:
    """ψ_j: the largest coupling of the lower capsules at one position, summed over all positions.  Rawlinson 2018."""
    return coupling.unflatten(1, (GRID[0] * GRID[1], -1)).amax(2).sum(1)


SCORES = {
    "explanation": lambda x, W, routed: explanation(x, W),
    "length": lambda x, W, routed: torch.linalg.vector_norm(routed.z, dim=2),
    "support": lambda x, W, routed: support(routed.coupling),
    "agreement": lambda x, W, routed: routed.agreement,
    "standardised": lambda x, W, routed: routed.agreement,
}


class Standardised(nn.Module):
    """A score less its running mean, over its running deviation, capsule by capsule; both move while training."""

    def __init__(self, capsules: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(capsules))
        self.register_buffer("variance", torch.zeros(capsules))
        self.register_buffer("updates", torch.zeros(()))

    def forward(self, score: Float[Tensor, "B J"]) -> Float[Tensor, "B J"]:
        if self.training:
            self.updates += 1
            weight = max(1 - MEMORY, 1 / self.updates.item())
            self.mean.lerp_(score.mean(0), weight)
            self.variance.lerp_(score.var(0), weight)
        return (score - self.mean) / self.variance.sqrt().clamp(min=1e-12)


class AblatedEncoder(CapsuleEncoder):
    """An encoder whose capsules are ranked by another score, or whose masked couplings are left as they are.

    Boosts are steps of a fixed size. So that they do not mean less or more than for the explanation, another score is
    scaled so that it deviates from capsule to capsule by ``unit``.
    """

    def __init__(self, encoder: CapsuleEncoder, variant: Variant, unit: float):
        lower, upper, _, lower_dim = encoder.W.shape
        super().__init__(lower, lower_dim, encoder.settings)
        self.load_state_dict(encoder.state_dict())
        self.variant, self.unit = variant, unit
        self.standardise = Standardised(upper) if variant.score == "standardised" else nn.Identity()

    @torch.no_grad()
    def couplings(self, x: Float[Tensor, "B I e"]) -> Float[Tensor, "B I J"]:
        """As in the library; after training one capsule is on and, where couplings are shared out, takes them all."""
        routed = self.route(x)
        score = self.score(x, routed)
        mask = self.sparsity.mask(score)
        if self.training:
            self.sparsity.update(score)
        if not self.variant.shared_out:
            return routed.coupling * mask.unsqueeze(1)
        return share_out(routed.coupling, mask) if self.training else mask.unsqueeze(1).expand_as(routed.coupling)

    def score(self, x: Float[Tensor, "B I e"], routed: RoutingState) -> Float[Tensor, "B J"]:
        """What capsules are ranked by, before any boost."""
        score = self.standardise(SCORES[self.variant.score](x, self.W, routed))
        if self.variant.score == "explanation":
            return score
        return score * (self.unit / score.std(1).mean().clamp(min=1e-12))


def build(name: str, variant: Variant, stage1: ExpertCapsules, unit: float, seed: int) -> ExpertCapsules:
    """A model to be trained, with the autoencoder of ``stage1``; where it can be, its encoder is the library's own."""
    torch.manual_seed(seed)
    model = ExpertCapsules(replace(stage1.settings, preset=name, encoder=variant.settings))
    model.autoencoder = stage1.autoencoder
    if variant != Variant(variant.settings):
        model.encoder = AblatedEncoder(model.encoder, variant, unit)
    return model


def score_unit(model: ExpertCapsules, lower: Float[Tensor, "N I e"]) -> float:
    """How much the explanation of a trained ``model`` deviates from capsule to capsule, a mean over 1,000 images."""
    with torch.no_grad():
        return explanation(squash(lower[:1000].float()), model.encoder.W).std(1).mean().item()


def ranks(score: Float[Tensor, "N J"]) -> dict[str, list]:
    """Scores in falling order over the largest one, means over images; and how often each capsule has each rank."""
    falling, order = score.sort(dim=1, descending=True)
    counts = torch.zeros(score.shape[1], score.shape[1])
    for rank, capsules in enumerate(order.T):
        counts[:, rank] = torch.bincount(capsules, minlength=score.shape[1])
    return {
        "share_of_largest": (falling / falling[:, :1]).mean(0).tolist(),
        "rank_frequency": (counts / len(score)).tolist(),
    }


@torch.no_grad()
def shipped_ranks(model: ExpertCapsules, test: Split) -> dict[str, dict]:
    """Ranks by coupling support and by explanation, before any capsule is turned off.  Rawlinson 2018, figs. 3, 4."""
    found = {"support": [], "explanation": []}
    for part in test.lower.split(250):
        x = squash(part.float())
        found["support"].append(support(model.encoder.route(x).coupling))
        found["explanation"].append(explanation(x, model.encoder.W))
    return {name: ranks(torch.cat(scores)) for name, scores in found.items()}


def fingerprint(module: nn.Module) -> str:
    """Twelve letters that change when a weight does."""
    content = b"".join(tensor.contiguous().numpy().tobytes() for tensor in module.state_dict().values())
    return hashlib.sha256(content).hexdigest()[:12]


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
    unit, autoencoder = score_unit(stage1, train_split.lower), fingerprint(stage1.autoencoder)
    digits = {"digits": as_bytes(test.images[one_of_each_class(test.labels)])}
    show_titles()
    for name in names:
        variant = VARIANTS[name]
        if results.quick:
            variant = variant._replace(settings=replace(variant.settings, steps=QUICK_STEPS))
        facts = variant._asdict() | {"settings": asdict(variant.settings), "autoencoder": autoencoder}
        if not results.holds(name, **facts):
            started = time.monotonic()
            model = fit(name, build(name, variant, stage1, unit, seed), train_split.lower, seed)
            record = facts | {"score_unit": unit, "seconds": round(time.monotonic() - started, 1)}
            record["measures"], images = measure(model, Split(*(part[:READ_OUT] for part in train_split)), test, seed)
            results.add(name, record, digits | {name + end: image for end, image in images.items()})
        show(name, results.content["variants"][name])


def main(arguments: list[str] | None = None) -> None:
    results, names = command_line(__doc__, list(VARIANTS), arguments)
    run_shipped(results)
    run(results, names)


if __name__ == "__main__":
    main()
