"""Train CapsNet on pairs of overlapping digits, and measure how well it reads and draws both.  Sabour2017, section 6.

    python -m experiments.multi_mnist --out capsnb/results/multi-mnist.json     about 25 minutes of one processor core
    python -m experiments.multi_mnist --quick --out FILE     few updates on the shipped sample: only for checks

It begins with the convolutions of the shipped CapsNet, trained on single digits; everything else begins anew. The pairs
it learns from are drawn from the 60,000 training images of MNIST as they are needed, the 10,000 that measure it from
the test images, once. The seed (--seed) draws both, and the first weights. An interrupted run goes on from
NAME.checkpoint.safetensors when the command is given again; the weights are not kept.

The JSON holds settings, the seconds since training last began or went on, and what is measured on the test pairs. The
safetensors file beside it holds some of these, the first that are read rightly and then the first that are not:
"images" and, of each pair, the two "digits" alone, their "labels", the classes "found" of the three longest capsules,
the longest first, and what the capsules of the labels and of the found classes reconstruct, "of_labels" and
"of_found". Pictures are [.., 36, 36] of 8 bits.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from capsnb import checkpoints, data, runs
from capsnb.baselines import capsnet_pairs
from capsnb.baselines.capsnet import load_capsnet
from capsnb.baselines.capsnet_pairs import PairsCapsNet, longest, start_from, train_on_pairs
from capsnb.baselines.capsule_network import squared_error
from capsnb.multi_mnist import Pairs, draw_pairs
from capsnb.training import Step
from experiments.results import fingerprint

START = "capsnet-mnist"
TEST_PAIRS = 10_000
SHOW_EVERY = 50  # updates
RIGHT, WRONG = 12, 4  # pairs of either kind that are kept as pictures, at most
QUICK_EPOCHS, QUICK_PAIRS = 0.2, 500


def both_found(found: Tensor, labels: Tensor) -> Tensor:
    """Whether the first two classes ``found``, in either order, are the two of the ``labels``; both [B, 2 or more]."""
    return (found[:, :2].sort(1).values == labels.sort(1).values).all(1)


def measure(network: PairsCapsNet, pairs: Pairs, capsules: Float[Tensor, "B J d"]) -> dict:
    """The share of pairs whose two longest capsules are not those of its two classes, and squared errors per digit.

    These are of each digit alone against what the capsule of its class reconstructs, against the whole image, and
    against nothing.
    """
    wrong = int((~both_found(longest(capsules, 2), pairs.labels)).sum())
    made = network.reconstruct_each(capsules, pairs.labels)
    whole = pairs.images.unsqueeze(1).expand_as(made)
    digits, count = pairs.digits.flatten(0, 1), len(pairs.images)
    errors = {"squared_error": made, "of_the_image": whole, "of_nothing": torch.zeros_like(made)}
    means = {name: squared_error(guess.flatten(0, 1), digits).mean().item() for name, guess in errors.items()}
    return {"pairs": count, "wrong": wrong, "error": wrong / count, **means}


def pictures(network: PairsCapsNet, pairs: Pairs, capsules: Float[Tensor, "B J d"]) -> dict[str, Tensor]:
    """The first pairs that are read rightly, then the first that are not, and what capsules reconstruct of them."""
    found = longest(capsules, 3)
    right = both_found(found, pairs.labels)
    rows = torch.cat([right.nonzero()[:RIGHT, 0], (~right).nonzero()[:WRONG, 0]])
    images, digits, labels = (part[rows] for part in pairs)
    chosen, found = capsules[rows], found[rows]
    drawn = {"images": images, "digits": digits}
    drawn |= {f"of_{name}": network.reconstruct_each(chosen, c) for name, c in (("labels", labels), ("found", found))}
    as_bytes = {name: (255 * part.squeeze(-3)).round().to(torch.uint8) for name, part in drawn.items()}
    return as_bytes | {"labels": labels.to(torch.uint8), "found": found.to(torch.uint8)}


def follow(updates: Iterator[Step]) -> float:
    """Run ``updates`` to their end, printing the loss now and then; the seconds that it took."""
    started = time.monotonic()
    for step in updates:
        if step.step % SHOW_EVERY == 0 or step.step == step.steps:
            print(f"update {step.step} of {step.steps}, loss {step.loss:.4f}", flush=True)
    return round(time.monotonic() - started, 1)


def run(out: Path, *, quick: bool, seed: int) -> dict:
    """Train, measure, and write both files; what the JSON holds."""
    settings = capsnet_pairs.PAIRS
    settings = replace(settings, epochs=QUICK_EPOCHS) if quick else settings
    train, test = (data.load("mnist", split, sample=quick) for split in ("train", "test"))
    record = {"images": len(train[0]), "seed": seed, "quick": quick, "settings": asdict(settings)}
    checkpoint = out.with_suffix(".checkpoint.safetensors")
    torch.manual_seed(seed)
    network = PairsCapsNet(settings)
    start_from(network, load_capsnet())
    seconds = follow(train_on_pairs(network, *train, seed=seed, checkpoint=checkpoint))
    pairs = draw_pairs(*test, QUICK_PAIRS if quick else TEST_PAIRS, rng=torch.Generator().manual_seed(seed))
    capsules = network.eval().encode(pairs.images)
    record |= {"start": fingerprint(START), "seconds": seconds, "test": measure(network, pairs, capsules)}
    checkpoints.write(out.with_suffix(".safetensors"), pictures(network, pairs, capsules))
    checkpoints.write_json(out, record | {"versions": runs.versions()})
    checkpoint.unlink()
    return record


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="few updates on the shipped sample: for checks only")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    record = run(options.out, quick=options.quick, seed=options.seed)
    print(f"{record['test']}, {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
