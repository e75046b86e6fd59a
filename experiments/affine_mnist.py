"""Affine MNIST: what do codes still tell of digits that are turned, slanted, stretched and moved?

    python -m experiments.affine_mnist --out capsnb/results/affine-mnist.json
    python -m experiments.affine_mnist --only windows-all-on --out FILE
    python -m experiments.affine_mnist --quick --out FILE      on the shipped sample: only for checks

The affine digits are *regenerated, not the original files* (see capsnb.affine_mnist). No encoder has learned from one,
nor, CapsNet and EM routing excepted, from labels; the classifier of the codes has, by the protocols of Rawlinson2018.
In (a) it learns from affine digits, in (b) from MNIST digits in the middle of the frame, and both are tested on affine
digits; "mnist" is (b)'s classifier on MNIST digits. It is a support vector machine with the settings of
``evaluation.svm_probe``; "a_published_settings" is (a) with those of the paper's code. It learns from the first 10,000
training images of MNIST, or as many affine digits made of them, and is tested on every other test image, 5,000 in all.
"alone" holds (b) on 500 of them for one change at a time, "few" (a) when the classifier learns from the first affine
digits only.

A row is a code, and where in the frame it is taken: of the whole "frame"; in the "windows" of 28 x 28 that the shipped
model's capsules answer most; in those that capsules with a random W do, or others that were trained without views
("unviewed"; they are trained when they are first needed, and not kept); or about the centre of "mass", an easier task,
to be named so. Rows whose weights do not ship are left out. A finished row is written at once, and kept when the
command runs again, unless its weights have changed since.

"windows" says how well the windows of a row's kind are placed: "within_1" and "within_2" are the shares of the affine
test digits whose centre of mass lies so many pixels from the window's middle at most, down and across; "cut" is the
share of the ink outside. The safetensors file holds the first affine test digits, "frames", and for every row as "NAME"
what it sees of them. "seconds" are those of one processor core.
"""

import time
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from sklearn.svm import SVC
from torch import Tensor

from capsnb import data
from capsnb.affine_mnist import FramedDigits, draw_maps, protocols, room, transform
from capsnb.evaluation import SVM_C, svm_gamma
from capsnb.pretrained import WEIGHTS
from capsnb.windows import SIDE, centre_of_mass
from experiments import results
from experiments.affine_codes import CODES, MODEL, SEARCHES, OfSet, Views
from experiments.common import as_bytes

CLASSIFIED, QUICK_CLASSIFIED = 10_000, 200  # digits that the classifier learns from
TESTED_EVERY = 2  # which test images: the first half of them is the easier one
ALONE, QUICK_ALONE = 500, 50  # test digits for one change at a time
FEW = (100, 300, 1000, 3000)  # digits that the classifier learns from in "few"
PUBLISHED = {"C": 100.0, "gamma": 0.1}  # of the machine in the code of Rawlinson2018
CHANGES = {"turned": [0], "slanted": [1], "stretched": [2, 3], "moved": []}  # which shares of ``draw_maps`` are drawn
SHOWN = 12  # frames
TABLE = ("a", "b", "mnist", "a_published_settings")

Codes = Float[Tensor, "N ..."]
Labels = Int[Tensor, "N"]


class Row(NamedTuple):
    """Where in the frame, and which code of it."""

    where: str
    code: str


ROWS = {
    f"{where}-{code}": Row(where, code)
    for where, codes in {
        "windows": ("one-on", "all-on", "random", "pixels"),
        "random-windows": ("random",),
        "unviewed-windows": ("unviewed-one-on", "unviewed-all-on"),
        "mass": (
            *("one-on", "all-on", "unviewed-one-on", "unviewed-all-on", "random", "random-one-on", "pixels"),
            *("vae", "rbm", "capsnet", "em-routing", "sparse-capsules"),
        ),
        "frame": ("pixels", "pca"),
    }.items()
    for code in codes
}


def changed_alone(digits: Tensor, labels: Labels, change: str, *, rng: torch.Generator) -> FramedDigits:
    """Affine digits as ``affine_mnist.regenerate`` makes them, with all but one kind of change left out."""
    shares = torch.full((len(digits), 4), 0.5)
    shares[:, CHANGES[change]] = torch.rand(len(digits), len(CHANGES[change]), generator=rng)
    maps, moves = draw_maps(shares), torch.zeros(len(digits), 2)
    if change == "moved":
        low, high = room(digits, maps)
        moves = low + torch.rand(len(digits), 2, generator=rng) * (high - low)
    return FramedDigits(transform(digits, maps, moves), labels, f"MNIST, {change} only (regenerated)")


def framed(is_quick: bool, seed: int) -> dict[str, FramedDigits]:
    """All sets of frames by their names."""
    train, test = (data.load("mnist", split, sample=is_quick) for split in ("train", "test"))
    count, alone = (QUICK_CLASSIFIED, QUICK_ALONE) if is_quick else (CLASSIFIED, ALONE)
    rng = torch.Generator().manual_seed(seed)
    test = tuple(each[::TESTED_EVERY] for each in test)
    found = protocols(tuple(each[:count] for each in train), test, rng=rng)
    sets = {"placed": found["a"].encoder, "affine": found["a"].classifier, "plain": found["b"].classifier}
    sets |= {"affine test": found["a"].test, "plain test": found["mnist"].test}
    few = [each[:alone] for each in test]
    return sets | {f"{change} test": changed_alone(*few, change, rng=rng) for change in CHANGES}


class Machine:
    """A support vector machine with a Gaussian kernel, as ``svm_probe``'s; C and gamma can be others.

    Its kernel comes from products of whole matrices, which is several times faster and takes 8 bytes for every pair of
    digits that it learns from.
    """

    def __init__(self, codes: Codes, labels: Labels, C: float = SVM_C, gamma: float | None = None):
        self.codes, self.gamma = codes.flatten(1), svm_gamma(codes) if gamma is None else gamma
        self.machine = SVC(C=C, kernel="precomputed").fit(self.kernel(self.codes), labels.numpy())

    def kernel(self, codes: Codes):
        """exp(-gamma times the squared distance) to every digit that was learned from."""
        return torch.cdist(codes.flatten(1), self.codes).square_().mul_(-self.gamma).exp_().numpy()

    def accuracy(self, codes: Codes, labels: Labels) -> float:
        """The share of the digits that are classified rightly."""
        return float(self.machine.score(self.kernel(codes), labels.numpy()))


def measure(code: OfSet, sets: dict[str, FramedDigits]) -> dict:
    """All accuracies with a code."""
    affine, tested = code("affine"), code("affine test")
    a, published = (Machine(affine, sets["affine"].labels, **options) for options in ({}, PUBLISHED))
    b, truth = Machine(code("plain"), sets["plain"].labels), sets["affine test"].labels
    few = {count: Machine(affine[:count], sets["affine"].labels[:count]) for count in FEW if count < len(affine)}
    alone = {change: f"{change} test" for change in CHANGES}
    return {
        "numbers": affine[0].numel(),
        "classifier_images": len(affine),
        "test_images": len(tested),
        "gamma": {"a": a.gamma, "b": b.gamma},
        "a": a.accuracy(tested, truth),
        "b": b.accuracy(tested, truth),
        "mnist": b.accuracy(code("plain test"), sets["plain test"].labels),
        "a_published_settings": published.accuracy(tested, truth),
        "few": {str(count): machine.accuracy(tested, truth) for count, machine in few.items()},
        "alone": {change: b.accuracy(code(name), sets[name].labels) for change, name in alone.items()},
    }


def placement(views: Views, where: str) -> dict[str, float]:
    """How well the windows of the affine test digits are placed, and the share of their ink outside."""
    frames, places = views.frames("affine test"), views.places(where, "affine test")
    away = (centre_of_mass(frames) - (SIDE - 1) / 2 - places).abs().amax(1)
    seen = views.images(where, "affine test").sum((1, 2, 3)) / frames.sum((1, 2, 3))
    within = {f"within_{pixels}": (away <= pixels).float().mean().item() for pixels in (1, 2)}
    return within | {"cut": 1 - seen.mean().item()}


def shipped(name: str) -> bool:
    """Whether the weights of a row are there."""
    return all((WEIGHTS / f"{weights}.safetensors").exists() for weights in CODES[ROWS[name].code].weights)


class Results(results.Results):
    """As for every experiment; a row is finished if it was made with the weights that are there now."""

    records = "rows"

    def holds(self, name: str) -> bool:
        return super().holds(name, fingerprint=fingerprint(name))


def fingerprint(name: str) -> str:
    """What changes when the weights of a row do, or those of the model that chooses its windows."""
    where, code = ROWS[name]
    return results.fingerprint(*CODES[code].weights, *([MODEL] if where in SEARCHES else []))


def run(found: Results, names: list[str]) -> None:
    """Measure and write every row of ``names`` that ``found`` lacks and whose weights ship."""
    views = Views(framed(found.quick, found.seed), found.quick, found.seed)
    print(f"{'':24s}{''.join(f'{title:>22s}' for title in TABLE)}  seconds")
    for name in filter(shipped, names):
        if not found.holds(name):
            started, row = time.process_time(), ROWS[name]
            torch.manual_seed(found.seed)
            code = CODES[row.code].make(views, row.where)
            record = row._asdict() | measure(code, views.sets) | {"fingerprint": fingerprint(name)}
            if row.where != "frame":
                found.content.setdefault("windows", {})[row.where] = placement(views, row.where)
            record["seconds"] = round(time.process_time() - started, 1)
            found.add(name, record, pictures(name, views))
        show(name, found.content["rows"][name])


def pictures(name: str, views: Views) -> dict[str, Tensor]:
    """The first affine test digits, and what a row sees of them."""
    seen = views.images(ROWS[name].where, "affine test")
    return {name: as_bytes(seen[:SHOWN]), "frames": as_bytes(views.sets["affine test"].images[:SHOWN])}


def show(name: str, record: dict) -> None:
    """One line of the table."""
    print(f"{name:24s}{''.join(f'{record[key]:22.4f}' for key in TABLE)}{record['seconds']:9.0f}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    run(*results.command_line(__doc__, list(ROWS), arguments, Results))


if __name__ == "__main__":
    main()
