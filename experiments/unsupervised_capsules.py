"""Unsupervised capsules, sparse and dense: the figures and the table of Rawlinson2018.

    for preset in dense sparse-frames dense-frames; do
        python -m capsnb train --system sparse-capsules --preset $preset --dataset mnist --out runs/$preset; done
    python -m capsnb export runs/dense runs/dense.safetensors
    python -m experiments.unsupervised_capsules capsnb/weights/{sparse-capsules,capsnet}-mnist.safetensors \\
        runs/dense.safetensors runs/{sparse,dense}-frames/model.safetensors \\
        --out capsnb/results/unsupervised-capsules.json

Each file gives an entry. Of "capsnet" there is the support of its capsules alone (figure 3). "sparse" and "dense" have
what the metrics beside the file have of the test images; "read_alone", how often the shipped classifier reads rightly
what each capsule alone, without a mask, draws of the first 1,000 images; and "table_1", the accuracies of
``affine_mnist`` on digits centred by their mass, with the capsules as they are, "unmasked", and, of the sparse network,
"masked". "sparse-frames" and "dense-frames", networks of 40 x 40 pixels, have their table of digits where they lie, and
the squared errors of its test digits, "centred" and "affine".

The pictures of the first two are in the safetensors file, of 8 bits, all of the first test image of some classes,
"images":

    NAME/whole     reconstructions from all capsules
    NAME/alone     from each capsule alone, [image, capsule, ..]
    NAME/unmasked  from each alone that no mask has made shorter
    NAME/without   from all capsules but one
    NAME/moved     with ``AMOUNTS`` added to each number of the longest capsule, [image, number, amount, ..]

Of the other two there are the first affine test digits, "NAME/frames", and their reconstructions, "NAME/whole".
A finished entry is written at once, and kept when the command runs again with the same file.
"""

import argparse
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capsnb import checkpoints, data, systems
from capsnb.affine_mnist import SIZE
from capsnb.baselines.capsule_network import CapsuleNetwork, squared_error
from capsnb.baselines.sparse_capsules import Latent, SparseCapsules
from capsnb.classifier import load_classifier
from capsnb.evaluation import ranks, winner
from capsnb.sampling import one_at_a_time
from capsnb.sparsity import support
from experiments.affine_codes import Views
from experiments.affine_mnist import framed, measure
from experiments.common import as_bytes, in_parts, one_of_each_class
from experiments.results import Results, of_files

AMOUNTS = tuple(round(0.2 * step, 1) for step in range(-5, 6))  # added to a number; their figure 5
READ = 1000  # images for "read_alone"
SHOWN = slice(0, None, 3)  # of the ten classes
FRAMES = 12  # shown with their reconstructions


class Entries(Results):
    """As for every experiment."""

    records = "entries"


def name_of(network: CapsuleNetwork) -> str:
    """What the entry of a network is called."""
    if not isinstance(network, SparseCapsules):
        return "capsnet"
    return ("sparse" if network.settings.gamma else "dense") + ("-frames" if network.settings.size == SIZE else "")


def supports(network: CapsuleNetwork, images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, "B J"]:
    """The support of every upper capsule."""
    return in_parts(lambda part: support(network.route(part).coupling, network.positions), images)


def pictures(network: SparseCapsules, images: Float[Tensor, "B 1 28 28"]) -> dict[str, Tensor]:
    """All that is drawn of the images."""
    capsules = network.encode(images)
    alone = one_at_a_time(capsules)
    layers = {"whole": capsules, "alone": alone, "unmasked": one_at_a_time(network.latent(images).capsules)}
    layers |= {"without": capsules.unsqueeze(1) - alone, "moved": moved(capsules)}
    drawn = {key: as_bytes(network.decode(each.flatten(0, -3))) for key, each in layers.items()}
    return {key: each.unflatten(0, layers[key].shape[:-2]) for key, each in drawn.items()}


def moved(capsules: Float[Tensor, "B J d"]) -> Float[Tensor, "B d amounts J d"]:
    """The capsules with every one of ``AMOUNTS`` added to every number of the longest."""
    count, dim = len(capsules), capsules.shape[2]
    steps = torch.tensor(AMOUNTS).view(1, -1, 1) * torch.eye(dim).unsqueeze(1)  # [number, amount, d]
    layers = capsules[:, None, None].repeat(1, dim, len(AMOUNTS), 1, 1)
    layers[torch.arange(count), :, :, winner(capsules)] += steps
    return layers


def read_alone(network: SparseCapsules, images: Float[Tensor, "B 1 28 28"], labels: Int[Tensor, "B"]) -> list[float]:
    """For every capsule the share of images that the classifier reads rightly from it alone, without masks."""
    alone, classifier = one_at_a_time(network.latent(images).capsules), load_classifier()
    read = (classifier.probabilities(network.decode(layers)).argmax(1) for layers in alone.unbind(1))
    return [(found == labels).float().mean().item() for found in read]


class Seen:
    """The sets of ``affine_mnist`` as a network sees them, each encoded once."""

    def __init__(self, network: SparseCapsules, found: Results):
        torch.manual_seed(found.seed)
        self.network, self.views = network, Views(framed(found.quick, found.seed), found.quick, found.seed)

    def images(self, name: str) -> Float[Tensor, "N 1 H W"]:
        """Whole frames if the network sees these, else windows about the centres of mass."""
        return self.views.images("frame" if self.network.settings.size == SIZE else "mass", name)

    def latent(self, name: str) -> Latent:
        return self.views.keep(("latent", name), lambda: self.network.latent(self.images(name)))

    def unmasked(self, name: str) -> Float[Tensor, "N J d"]:
        return self.latent(name).capsules

    def masked(self, name: str) -> Float[Tensor, "N J d"]:
        return self.network.masked(self.latent(name))

    def table_1(self) -> dict[str, dict]:
        """The accuracies with capsules as they are and, where there is a mask, with masked ones."""
        ways = {"unmasked": self.unmasked} | ({"masked": self.masked} if self.network.settings.gamma else {})
        return {way: measure(code, self.views.sets) for way, code in ways.items()}

    def reconstructions(self, name: str) -> Float[Tensor, "N 1 H W"]:
        """What the decoder makes of the masked capsules."""
        return self.views.keep(("whole", name), lambda: in_parts(self.network.decode, self.masked(name)))

    def error(self, name: str) -> float:
        """The mean squared error of the reconstructions."""
        return squared_error(self.reconstructions(name), self.images(name)).mean().item()


def entry(path: Path, network: CapsuleNetwork, images: Tensor, labels: Tensor, found: Entries) -> tuple[dict, dict]:
    """The record of the network in ``path``, and its pictures."""
    if not isinstance(network, SparseCapsules):
        return {"support": ranks(supports(network, images))}, {}
    seen = Seen(network, found)
    if network.settings.size == SIZE:
        record = {"squared_error": {"centred": seen.error("plain test"), "affine": seen.error("affine test")}}
        drawn = {"frames": seen.images("affine test"), "whole": seen.reconstructions("affine test")}
        return record | {"table_1": seen.table_1()}, {key: as_bytes(each[:FRAMES]) for key, each in drawn.items()}
    metrics = checkpoints.read_json(path.with_suffix(".metrics.json"))["test"]
    alone = read_alone(network, images[:READ], labels[:READ])
    record = {"metrics": metrics, "read_alone": alone, "table_1": seen.table_1()}
    return record, pictures(network, images[one_of_each_class(labels)[SHOWN]])


def run(paths: list[Path], found: Entries) -> None:
    """Write the entries of all ``paths`` that ``found`` lacks."""
    images, labels = data.load("mnist", "test", sample=found.quick)
    for path in paths:
        network = systems.load(path)[1]
        name, digest = name_of(network), of_files(path)
        if found.content["entries"].get(name, {}).get("weights") != digest:
            record, drawn = entry(path, network, images, labels, found)
            arrays = {f"{name}/{key}": each for key, each in drawn.items()}
            arrays["images"] = as_bytes(images[one_of_each_class(labels)[SHOWN]])
            found.add(name, {"weights": digest} | record, arrays)
        table = found.content["entries"][name].get("table_1", {})
        print(name, {way: [each[key] for key in ("mnist", "a", "b")] for way, each in table.items()}, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, nargs="+", help="weight files as `export` writes them")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or to go on with")
    parser.add_argument("--quick", action="store_true", help="little of everything, on the sample: for checks only")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    run(options.weights, Entries(options.out, options.quick, options.seed))


if __name__ == "__main__":
    main()
