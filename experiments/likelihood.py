"""How likely are digits to the trained models? log Z by annealed importance sampling, and log densities of images.

    python -m experiments.likelihood --out capsnb/results/likelihood.json
    python -m experiments.likelihood --quick --out FILE      few chains on the shipped samples: only for checks
    python -m experiments.likelihood --only mnist rbm --out FILE

For every shipped capsule model: log Z relative to the uniform density on the product of unit balls, couplings found
anew at every x, with more and more temperatures; back down again from where the chains end; and of one expert alone,
where the truth is known. Then the log density, in nats above uniform, of the lower capsules of training and test
digits, of other images, and of capsules that keep only the lengths or only the directions of the test digits'.
For the RBM that ships: log Z, and the log probability of binarised digits and others. A finished entry is written at
once, and kept when the command runs again, unless the weights have changed since.

The JSON holds the estimates. The safetensors file beside it holds "MODEL/SET", the log density of every x of a set in
nats, in 16 bits, and "MODEL/pictures", where eight chains ended, decoded by stage 1, in 8 bits.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from capsnb import data, load_pretrained, unsquash
from capsnb.baselines import rbm as rbms
from capsnb.baselines.rbm import RBM
from capsnb.energy import free_energy
from capsnb.exact import uniform_in_balls
from capsnb.likelihood import (
    Annealed,
    FreeEnergy,
    anneal_capsules,
    anneal_rbm,
    frozen_log_likelihood,
    independent_pixels,
    ladder,
    log_mean,
    log_z_of_each_expert,
    rerouted,
    tune,
)
from capsnb.measures import CLOSER
from capsnb.model import ExpertCapsules
from capsnb.pretrained import WEIGHTS
from experiments import results
from experiments.common import as_bytes, in_parts

MODELS = ("mnist", "mnist-dense", "mnist-paper")
NAMES = (*MODELS, "rbm")


class Sizes(NamedTuple):
    """How much is computed."""

    images: int = 2_000  # of every set
    chains: int = 64
    pilots: int = 16
    ladders: tuple[int, ...] = (1, 5, 25, 125)  # temperatures above 0; 1 is plain importance sampling
    down: int = 25  # temperatures on the way back
    rbm_chains: int = 400
    rbm_ladders: tuple[int, ...] = (100, 500, 2_500)
    rbm_gibbs: int = 1_000  # steps from test images before the way back


QUICK = Sizes(images=50, chains=7, pilots=3, ladders=(1, 2), down=2, rbm_chains=7, rbm_ladders=(2, 5), rbm_gibbs=3)
PICTURES, PIXELS = 8, 784


def estimate(found: Annealed, steps: int, seconds: float, down: bool = False) -> dict[str, float]:
    """log Z from the weights of chains, which on the way ``down`` estimate 1/Z."""
    value, error, effective = log_mean(found.log_weight)
    spread = found.log_weight.std().item()
    value = -value if down else value
    facts = {"temperatures": steps, "log_z": value, "error": error, "effective": effective}
    return facts | {"spread": spread, "chains": len(found.log_weight), "processor_seconds": seconds}


def climb(
    F: FreeEnergy, shape: tuple[int, int], temperatures: Sequence[float], sizes: Sizes, *, rng: torch.Generator
) -> Annealed:
    """Chains led from the uniform density to exp(-F), at the step sizes of pilots led before them."""
    pilots, x = (uniform_in_balls(n, *shape, rng=rng, dtype=torch.float32) for n in (sizes.pilots, sizes.chains))
    return anneal_capsules(F, x, temperatures, step_sizes=tune(F, pilots, temperatures, rng=rng), rng=rng)


def descend(F: FreeEnergy, x: Float[Tensor, "K I e"], sizes: Sizes, *, rng: torch.Generator) -> Annealed:
    """Chains led back from where they are to the uniform density."""
    temperatures = ladder(sizes.down)[::-1]
    steps = tune(F, x[: sizes.pilots], temperatures, rng=rng)
    return anneal_capsules(F, x, temperatures, step_sizes=steps, rng=rng)


def log_z_of_capsules(
    F: FreeEnergy, shape: tuple[int, int], sizes: Sizes, name: str, *, rng: torch.Generator
) -> tuple[dict, Float[Tensor, "K I e"]]:
    """Estimates of log Z with every ladder, the one on the way back, and where the chains of the longest end."""
    up = []
    for steps in sizes.ladders:
        start = time.process_time()
        found = climb(F, shape, ladder(steps), sizes, rng=rng)
        up.append(show(name, estimate(found, steps, time.process_time() - start)))
    start = time.process_time()
    down = estimate(descend(F, found.state, sizes, rng=rng), sizes.down, time.process_time() - start, down=True)
    return {"up": up, "down": show(f"{name}, down", down)}, found.state


def one_expert(model: ExpertCapsules, sizes: Sizes, *, rng: torch.Generator) -> dict:
    """log Z of the first expert alone, coupled to everything with weight 1: estimated, and the truth."""
    W = model.encoder.W.detach()[:, :1]
    F = lambda x: free_energy(x, W, x.new_ones(*x.shape[:2], 1))  # noqa: E731
    steps, start = sizes.ladders[-1], time.process_time()
    found = estimate(climb(F, (W.shape[0], W.shape[3]), ladder(steps), sizes, rng=rng), steps, 0.0)
    return found | {"exact": log_z_of_each_expert(W).item(), "processor_seconds": time.process_time() - start}


def image_sets(sizes: Sizes, quick: bool, *, rng: torch.Generator) -> dict[str, Float[Tensor, "B 1 28 28"]]:
    """Digits and what they are compared with, the pixels of all permuted images permuted alike.

    The first images of each split; quick runs take the shipped samples, others never do.
    """
    of = {"train": ("mnist", "train"), "test": ("mnist", "test"), "fashion": ("fashion-mnist", "test")}
    sets = {key: data.load(*source, sample=quick)[0][: sizes.images] for key, source in of.items()}
    order = torch.randperm(PIXELS, generator=rng)
    return sets | {"permuted": sets["test"].flatten(1)[:, order].view_as(sets["test"])}


def crossed(x: Float[Tensor, "B I e"], *, rng: torch.Generator) -> dict[str, Float[Tensor, "B I e"]]:
    """Uniform draws, the lengths of x in uniform directions, the directions of x at the lengths of uniform draws."""
    uniform = uniform_in_balls(*x.shape, rng=rng, dtype=x.dtype)
    length, other = (torch.linalg.vector_norm(capsules, dim=2, keepdim=True) for capsules in (x, uniform))
    mixed = {"lengths": length * normalize(uniform, dim=2), "directions": other * normalize(x, dim=2)}
    return {"uniform": uniform} | mixed


def describe(values: dict[str, Float[Tensor, "B"]]) -> dict[str, dict[str, float]]:
    """Of the log densities of every set: number, mean and its standard error, spread, and who is higher.

    The last is the share of all pairs of a test digit and one of the set in which the digit's is the higher one.
    """
    return {
        name: {
            "n": len(value),
            "mean": value.mean().item(),
            "error": (value.std() / len(value) ** 0.5).item(),
            "spread": value.std().item(),
            "test_higher": (values["test"][:, None] > value).float().mean().item(),
        }
        for name, value in values.items()
    }


def judge_capsules(name: str, sizes: Sizes, quick: bool, *, rng: torch.Generator) -> tuple[dict, dict[str, Tensor]]:
    """The entry of a capsule model, and its tensors."""
    model = load_pretrained(name)
    F, W = rerouted(model.encoder), model.encoder.W
    log_z, ends = log_z_of_capsules(F, (W.shape[0], W.shape[3]), sizes, name, rng=rng)
    sets = {key: in_parts(model.lower_capsules, part) for key, part in image_sets(sizes, quick, rng=rng).items()}
    sets |= crossed(sets["test"], rng=rng) | {"model": ends}
    values = {key: -in_parts(F, x) - log_z["up"][-1]["log_z"] for key, x in sets.items()}
    entry = {"log_z": log_z, "one_expert": one_expert(model, sizes, rng=rng), "log_density": describe(values)}
    entry["mean_length"] = {key: torch.linalg.vector_norm(x, dim=2).mean().item() for key, x in sets.items()}
    own = {key: frozen_log_likelihood(model.encoder, x) for key, x in sets.items()}
    entry["frozen"] = None if own["test"] is None else describe(own)
    return entry, values | {"pictures": as_bytes(in_parts(model.image, unsquash(ends[:PICTURES])))}


def log_z_of_rbm(
    rbm: RBM, base: RBM, test: Float[Tensor, "B V"], sizes: Sizes, *, rng: torch.Generator
) -> dict[str, list | dict]:
    """Estimates of log Z with every ladder, and with the longest on the way back, from chains that began at digits."""
    up, (v, log_z_base) = [], independent_pixels(base, sizes.rbm_chains, rng=rng)
    for steps in sizes.rbm_ladders:
        start = time.process_time()
        found = anneal_rbm(rbm, base, v, ladder(steps, power=CLOSER), rng=rng)
        shifted = found._replace(log_weight=found.log_weight + log_z_base)
        up.append(show("rbm", estimate(shifted, steps, time.process_time() - start)))
    v, start = test[: sizes.rbm_chains], time.process_time()
    for _ in range(sizes.rbm_gibbs):
        v = rbms.gibbs_step(rbm, v, rng=rng)
    found = anneal_rbm(rbm, base, v, ladder(steps, power=CLOSER)[::-1], rng=rng)
    shifted = found._replace(log_weight=found.log_weight - log_z_base)
    return {"up": up, "down": show("rbm, down", estimate(shifted, steps, time.process_time() - start, down=True))}


def judge_rbm(sizes: Sizes, quick: bool, *, rng: torch.Generator) -> tuple[dict, dict[str, Tensor]]:
    """The entry of the RBM, and its tensors: log probabilities of binary images.

    Beside it those of independent pixels, each as often 1 as in the training images, and of fair coins.
    """
    rbm = rbms.load_rbm(WEIGHTS / "rbm.safetensors")
    sets = {key: rbms.binarise(images, rng=rng) for key, images in image_sets(sizes, quick, rng=rng).items()}
    sets["uniform"] = torch.bernoulli(torch.full_like(sets["test"], 0.5), generator=rng)
    base = rbms.new_rbm(sets["train"], len(rbm.c), rng=rng, deviation=0.0)
    log_z = log_z_of_rbm(rbm, base, sets["test"], sizes, rng=rng)
    values = {key: -rbms.free_energy(rbm, v) - log_z["up"][-1]["log_z"] for key, v in sets.items()}
    independent = -rbms.free_energy(base, sets["test"]) - independent_pixels(base, 1, rng=rng)[1]
    baselines = {"independent_pixels": independent.mean().item(), "coins": -PIXELS * math.log(2)}
    return {"log_z": log_z, "log_density": describe(values), "baselines": baselines}, values


def show(name: str, found: dict[str, float]) -> dict[str, float]:
    """Print one line of an estimate and hand it on."""
    line = "{temperatures:6d} temperatures  log Z {log_z:9.3f} +- {error:.3f}  effective {effective:6.1f} of {chains}"
    print(f"{name:18s}{line.format(**found)}  {found['processor_seconds']:5.0f} s", flush=True)
    return found


class Results(results.Results):
    """As for every experiment, in 16 bits; an entry is finished if it was made with the weights that ship now."""

    records = "entries"

    def holds(self, name: str) -> bool:
        return super().holds(name, weights=fingerprint(name))

    def add(self, name: str, entry: dict, arrays: dict[str, Tensor]) -> None:
        small = {f"{name}/{key}": value.half() if value.is_floating_point() else value for key, value in arrays.items()}
        super().add(name, {"weights": fingerprint(name)} | entry, small)


def fingerprint(name: str) -> str:
    """A number that changes with what is judged: the RBM, or stages 1 and 2 of a shipped model."""
    if name == "rbm":
        parts = rbms.load_rbm(WEIGHTS / "rbm.safetensors")
    else:
        tensors = load_pretrained(name).state_dict()
        parts = [value for key, value in tensors.items() if key.startswith(("autoencoder.", "encoder."))]
    return results.digest(parts)


def run(found: Results, names: Sequence[str]) -> None:
    """Compute and write every entry of ``names`` that ``found`` lacks."""
    sizes = QUICK if found.quick else Sizes()
    for name in names:
        if found.holds(name):
            print(f"{name}: kept")
            continue
        rng = torch.Generator().manual_seed(found.seed)
        judge = partial(judge_rbm, sizes) if name == "rbm" else partial(judge_capsules, name, sizes)
        found.add(name, *judge(found.quick, rng=rng))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    run(*results.command_line(__doc__, list(NAMES), arguments, Results))


if __name__ == "__main__":
    main()
