"""Unsupervised capsules, sparse and dense: the figures and the table of Rawlinson2018.

    python -m capsnb train --system sparse-capsules --preset dense --dataset mnist --out runs/dense
    python -m capsnb export runs/dense runs/dense.safetensors
    python -m experiments.unsupervised_capsules capsnb/weights/{sparse-capsules,capsnet}-mnist.safetensors \\
        runs/dense.safetensors --out capsnb/results/unsupervised-capsules.json

Each file, with the metrics beside it, gives an entry: "sparse", "dense", or "capsnet", of which there is the support of
its capsules alone (figure 3). The other two have what "metrics" has of the test images; "table_1", the accuracies of
``affine_mnist`` on digits centred by their mass, with the capsules as they are "unmasked" and, of the sparse network,
"masked"; and "read_alone", how often the shipped classifier reads rightly what each capsule alone, without a mask,
draws of the first 1,000 images. Their pictures are in the safetensors file, of 8 bits, all of the first test image of
some classes, "images":

    NAME/whole     reconstructions from all capsules
    NAME/alone     from each capsule alone, [image, capsule, ..]
    NAME/unmasked  from each alone that no mask has made shorter
    NAME/without   from all capsules but one
    NAME/moved     with ``AMOUNTS`` added to each number of the longest capsule, [image, number, amount, ..]

A finished entry is written at once, and kept when the command runs again with the same file.
"""

import argparse
import hashlib
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capsnb import checkpoints, data, systems
from capsnb.baselines.capsnet import winners
from capsnb.baselines.capsule_network import CapsuleNetwork
from capsnb.baselines.sparse_capsules import SparseCapsules
from capsnb.classifier import load_classifier
from capsnb.evaluation import ranks
from capsnb.sampling import one_at_a_time
from capsnb.sparsity import support
from experiments.affine_codes import Views
from experiments.affine_mnist import framed, measure
from experiments.common import as_bytes, in_parts, one_of_each_class
from experiments.results import Results

AMOUNTS = tuple(round(0.2 * step, 1) for step in range(-5, 6))  # added to a number; their figure 5
READ = 1000  # images for "read_alone"
SHOWN = slice(0, None, 3)  # of the ten classes


class Entries(Results):
    """As for every experiment."""

    records = "entries"


def name_of(network: CapsuleNetwork) -> str:
    """What the entry of a network is called."""
    if isinstance(network, SparseCapsules):
        return "sparse" if network.settings.gamma else "dense"
    return "capsnet"


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
    layers[torch.arange(count), :, :, winners(capsules)] += steps
    return layers


def read_alone(network: SparseCapsules, images: Float[Tensor, "B 1 28 28"], labels: Int[Tensor, "B"]) -> list[float]:
    """For every capsule the share of images that the classifier reads rightly from it alone, without masks."""
    alone, classifier = one_at_a_time(network.latent(images).capsules), load_classifier()
    read = (classifier.probabilities(network.decode(layers)).argmax(1) for layers in alone.unbind(1))
    return [(found == labels).float().mean().item() for found in read]


def table_1(network: SparseCapsules, views: Views) -> dict[str, dict]:
    """The accuracies with capsules as they are and, where there is a mask, with masked ones."""
    ways = {"unmasked": lambda images: network.latent(images).capsules}
    ways |= {"masked": network.encode} if network.settings.gamma else {}
    return {
        way: measure(lambda name, encode=encode: in_parts(encode, views.images("mass", name)), views.sets)
        for way, encode in ways.items()
    }


def entry(path: Path, network: CapsuleNetwork, images: Tensor, labels: Tensor, found: Entries) -> tuple[dict, dict]:
    """The record of the network in ``path``, and its pictures."""
    if not isinstance(network, SparseCapsules):
        return {"support": ranks(supports(network, images))}, {}
    torch.manual_seed(found.seed)
    views = Views(framed(found.quick, found.seed), found.quick, found.seed)
    metrics = checkpoints.read_json(path.with_suffix(".metrics.json"))["test"]
    record = {"metrics": metrics, "read_alone": read_alone(network, images[:READ], labels[:READ])}
    record |= {"table_1": table_1(network, views)}
    return record, pictures(network, images[one_of_each_class(labels)[SHOWN]])


def run(paths: list[Path], found: Entries) -> None:
    """Write the entries of all ``paths`` that ``found`` lacks."""
    images, labels = data.load("mnist", "test", sample=found.quick)
    for path in paths:
        network = systems.load(path)[1]
        name, digest = name_of(network), hashlib.sha256(path.read_bytes()).hexdigest()[:16]
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
