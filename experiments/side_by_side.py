"""All systems of the book by the same measures: what their codes tell, what one capsule shows, what training costs.

    python -m experiments.side_by_side --out capsnb/results/side-by-side.json
    python -m experiments.side_by_side --only capsnet vae --out FILE
    python -m experiments.side_by_side --quick --out FILE      on the shipped samples: only for checks

Every system is read as it ships. Its code of an image, all numbers of it, is judged by a linear probe, trained on the
60,000 training images of MNIST; its groups are the longest capsules or, of systems without capsules, 20 clusters that
k-means finds in the codes. "read" is the share of the 10,000 test images whose reconstruction the shipped classifier
takes for the image's class, "read_alone" the same when only the longest capsule is decoded; matrix capsules have no
decoder. A finished row is written
at once, and kept when the command runs again, unless the weights have changed since.

"training" holds processor minutes of one thread: those of the first update, with what is prepared before it, and the
median of the next seven, times the updates that the shipped settings ask for. The safetensors file beside the JSON
holds the test images of the first of every class, "test", and as NAME and NAME/alone what each system makes of them.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from capsnb import data, load_pretrained, runs, systems
from capsnb.baselines.capsnet import CapsNet, load_capsnet, mask
from capsnb.baselines.matrix_capsules import load_em_routing
from capsnb.baselines.pca import PixelGaussian, fit_pixel_gaussian
from capsnb.baselines.rbm import hidden_probability, load_rbm, visible_probability
from capsnb.baselines.sparse_capsules import SparseCapsules, load_sparse_capsules
from capsnb.baselines.vae import VAE, load_vae
from capsnb.classifier import load_classifier
from capsnb.evaluation import assignment_accuracy, contingency, kmeans_table, linear_probe, purity, winner
from capsnb.model import ExpertCapsules
from capsnb.settings import PRESETS
from capsnb.training import Step, train_autoencoder, train_decoder, train_encoder
from experiments import results
from experiments.common import as_bytes, as_vectors, in_parts, one_of_each_class

CLUSTERS = 20  # of k-means: as many as the book's models have capsules
COMPONENTS = 320  # of the principal component analysis: as many numbers as 20 capsules of 16 have
TIMED = 8  # updates
TABLE = ("linear_probe", "purity", "assignment_accuracy", "read", "read_alone", "training")

Images = Float[Tensor, "N 1 28 28"]
Split = tuple[Tensor, Tensor]  # images and labels
Stages = list[Callable[[], Iterator[Step]]]


class Row(NamedTuple):
    """How a trained system encodes and, if it can, decodes, how it is trained, whether codes are capsules [N, J, d]."""

    weights: tuple[str, ...]
    load: Callable[[Images], Any]
    encode: Callable[[Any, Images], Float[Tensor, "N ..."]]
    decode: Callable[[Any, Float[Tensor, "N ..."]], Images] | None
    stages: Callable[[Split], Stages] = lambda train: []
    capsules: bool = False
    labels: bool = False


def expert_stages(preset: str, train: Split) -> Stages:
    """The three stages of an untrained model; each goes on from what the one before has done."""
    model = ExpertCapsules(PRESETS[preset]).eval()
    encoded = runs.Encoded(model, train[0])
    return [
        lambda: train_autoencoder(model.autoencoder, train[0], seed=0),
        lambda: train_encoder(model.encoder, encoded.lessons, seed=0),
        lambda: train_decoder(model.decoder, encoded.upper, encoded, seed=0),
    ]


def one_stage(name: str, train: Split) -> Stages:
    """The training of another system, in one go."""
    system = systems.SYSTEMS[name]
    inputs = train if system.labels else train[:1]
    return [lambda: system.train(system.make(system.default), *inputs, seed=0)]


def rebuild(pixels: PixelGaussian, codes: Float[Tensor, "N components"]) -> Images:
    """The images of coordinates along the principal directions."""
    return (pixels.mean + codes @ pixels.directions).clamp(0, 1).view(-1, 1, 28, 28)


def experts(name: str, preset: str) -> Row:
    """The expert capsules that ship as ``name``, of that preset."""
    load, stages = lambda train: load_pretrained(name), partial(expert_stages, preset)
    return Row((name,), load, ExpertCapsules.encode, ExpertCapsules.decode, stages, capsules=True)


def network(name: str, load: Callable[[], nn.Module], encode: Callable, decode: Callable | None, **kind: bool) -> Row:
    """The system that ships as ``name``-mnist and is trained in one go."""
    return Row((f"{name}-mnist",), lambda train: load(), encode, decode, partial(one_stage, name), **kind)


ROWS = {
    "pca": Row(
        (),
        lambda train: fit_pixel_gaussian(train, min(COMPONENTS, len(train))),
        lambda pixels, images: (images.flatten(1) - pixels.mean) @ pixels.directions.T,
        rebuild,
    ),
    "rbm": Row(
        ("rbm",),
        lambda train: load_rbm(),
        lambda rbm, images: hidden_probability(rbm, images.flatten(1)),
        lambda rbm, codes: visible_probability(rbm, codes).view(-1, 1, 28, 28),
        partial(one_stage, "rbm"),
    ),
    "vae": network("vae", load_vae, VAE.encode, VAE.decode),
    "capsnet": network("capsnet", load_capsnet, CapsNet.encode, CapsNet.decode, capsules=True, labels=True),
    "em-routing": network("em-routing", load_em_routing, as_vectors, None, capsules=True, labels=True),
    "sparse-capsules": network(
        "sparse-capsules", load_sparse_capsules, SparseCapsules.encode, SparseCapsules.decode, capsules=True
    ),
    "sparse": experts("mnist", "sparse"),
    "dense": experts("mnist-dense", "dense"),
    "paper": experts("mnist-paper", "paper"),
}


def longest(capsules: Float[Tensor, "N J d"]) -> Float[Tensor, "N J d"]:
    """The capsules with all but the longest of each image set to 0."""
    return mask(capsules, winner(capsules))


def parameters(system: Any) -> int:
    """How many numbers were learned."""
    tensors = system.parameters() if isinstance(system, nn.Module) else system
    return sum(tensor.numel() for tensor in tensors)


def groups(system: Row, codes: Tensor, test_codes: Tensor, labels: Int[Tensor, "M"], seed: int) -> dict:
    """How well the groups of the test images, longest capsules or clusters, agree with the classes; how many groups."""
    if system.capsules:
        table = contingency(winner(test_codes), labels, test_codes.shape[1])
    else:
        table = kmeans_table(codes, test_codes, labels, clusters=CLUSTERS, seed=seed)
    return {"purity": purity(table), "assignment_accuracy": assignment_accuracy(table), "groups": len(table)}


def minutes(stages: Stages) -> float | None:
    """Processor minutes that all stages would take, from the first ``TIMED`` updates of each; None without stages."""
    threads, seconds = torch.get_num_threads(), 0.0
    torch.set_num_threads(1)
    for stage in stages:
        moments = [time.process_time()]
        for step in stage():
            moments.append(time.process_time())
            if step.step == TIMED:
                break
        first, *others = (after - before for before, after in zip(moments, moments[1:]))
        seconds += first + (step.steps - 1) * (statistics.median(others) if others else 0.0)
    torch.set_num_threads(threads)
    return seconds / 60 if stages else None


def measure(system: Row, train: Split, test: Split, seed: int) -> tuple[dict, dict[str, Tensor]]:
    """All measures of a row, and its pictures by the end of their names."""
    (known, known_labels), (images, labels), classifier = train, test, load_classifier()
    trained, ends = system.load(known), {"": lambda codes: codes} | ({"/alone": longest} if system.capsules else {})
    codes, test_codes = (in_parts(partial(system.encode, trained), split) for split in (known, images))
    record = {"labels": system.labels, "parameters": parameters(trained), "numbers": codes[0].numel()}
    record |= {"linear_probe": linear_probe(codes, known_labels, test_codes, labels)}
    record |= groups(system, codes, test_codes, labels, seed)
    pictures = {}
    for end, chosen in ends.items() if system.decode else ():
        found = in_parts(partial(system.decode, trained), chosen(test_codes))
        right = classifier.probabilities(found).argmax(1) == labels
        record["read" + end.replace("/", "_")] = right.float().mean().item()
        pictures[end] = as_bytes(found[one_of_each_class(labels)])
    return record, pictures


class Results(results.Results):
    """As for every experiment; a row is finished if it was made with the weights that are there now."""

    records = "rows"

    def holds(self, name: str) -> bool:
        record = self.content["rows"].get(name, {})
        return record.get("fingerprint") == results.fingerprint("classifier-mnist", *ROWS[name].weights)


def run(found: Results, names: list[str]) -> None:
    """Measure and write every row of ``names`` that ``found`` lacks."""
    train, test = (data.load("mnist", split, sample=found.quick) for split in ("train", "test"))
    print(f"{'':12s}{''.join(f'{title:>21s}' for title in TABLE)}")
    for name in names:
        if not found.holds(name):
            system, fingerprint = ROWS[name], results.fingerprint("classifier-mnist", *ROWS[name].weights)
            torch.manual_seed(found.seed)
            record, pictures = measure(system, train, test, found.seed)
            record |= {"training": minutes(system.stages(train)), "fingerprint": fingerprint}
            shown = as_bytes(test[0][one_of_each_class(test[1])])
            found.add(name, record, {"test": shown} | {name + end: each for end, each in pictures.items()})
        show(name, found.content["rows"][name])


def show(name: str, record: dict) -> None:
    """One line of the table."""
    values = (record.get(key) for key in TABLE)
    print(f"{name:12s}{''.join(f'{value:21.4g}' if value is not None else 21 * ' ' for value in values)}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    run(*results.command_line(__doc__, list(ROWS), arguments, Results))


if __name__ == "__main__":
    main()
