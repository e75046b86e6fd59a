"""The restricted Boltzmann machine, the product of experts that expert capsules are modelled on.  Section 2.1.

Axes: visible units i (V of them), hidden units j (H of them), all of them 0 or 1. The conditionals are those that
follow from eq. 1; the paper prints them with slips in indices and signs.

    python -m capsnb.baselines.rbm --out capsnb/weights/rbm.safetensors     trains the one that ships, in minutes
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus
from tqdm.auto import tqdm

from capsnb import checkpoints, data, runs
from capsnb.checks import require_images, require_shape
from capsnb.training import Step

_MOST_UNITS = 16  # with 784 units in the other layer, a term for every state and unit takes 200 MB


class RBM(NamedTuple):
    """Weights w_ij, visible biases b_i, hidden biases c_j of eq. 1; also a gradient with respect to them."""

    w: Float[Tensor, "V H"]
    b: Float[Tensor, "V"]
    c: Float[Tensor, "H"]


@dataclass(frozen=True)
class RBMSettings:
    """How an RBM is trained; all values are ours, the paper trains none."""

    epochs: int = 10  # the pictures of chapter 2 change little after
    batch: int = 100
    learning_rate: float = 0.05  # decayed linearly to 0
    weight_decay: float = 1e-4  # on w only
    persistent: bool = False  # True: one Gibbs step an update of chains that are never restarted; False: CD-1


SHIPPED = RBMSettings(epochs=50, persistent=True)  # the size and kind of those in Salakhutdinov2008
SHIPPED_HIDDEN = 500


def binarise(images: Float[Tensor, "B 1 28 28"], *, rng: torch.Generator) -> Float[Tensor, "B 784"]:
    """Every pixel 1 with its grey value as the probability, else 0.  Salakhutdinov2008.

    Raises ValueError for images outside [0, 1] or of another shape.
    """
    require_images(images)
    return torch.bernoulli(images.flatten(1), generator=rng)


def new_rbm(v: Float[Tensor, "N V"], hidden: int, *, rng: torch.Generator, deviation: float = 0.01) -> RBM:
    """An untrained RBM: small normal weights, and visible biases that make every unit as often 1 as it is in ``v``."""
    w = deviation * torch.randn(v.shape[1], hidden, generator=rng).to(v)
    return RBM(w, v.mean(0).clamp(0.01, 0.99).logit(), v.new_zeros(hidden))


def energy(rbm: RBM, v: Float[Tensor, "B V"], h: Float[Tensor, "B H"]) -> Float[Tensor, "B"]:
    """E(v, h) = - sum w_ij v_i h_j - sum b_i v_i - sum c_j h_j.  Eq. 1."""
    return -(v @ rbm.w * h).sum(1) - v @ rbm.b - h @ rbm.c


def free_energy(rbm: RBM, v: Float[Tensor, "B V"]) -> Float[Tensor, "B"]:
    """F(v) = - sum b_i v_i - sum over j of log(1 + exp(sum_i w_ij v_i + c_j)): minus the log of Z p(v)."""
    return -v @ rbm.b - softplus(v @ rbm.w + rbm.c).sum(1)


def hidden_probability(rbm: RBM, v: Float[Tensor, "B V"]) -> Float[Tensor, "B H"]:
    """p(h_j = 1 given v) = sigmoid(sum_i w_ij v_i + c_j); section 2.1, mended."""
    return (v @ rbm.w + rbm.c).sigmoid()


def visible_probability(rbm: RBM, h: Float[Tensor, "B H"]) -> Float[Tensor, "B V"]:
    """p(v_i = 1 given h) = sigmoid(sum_j w_ij h_j + b_i); section 2.1, mended."""
    return (h @ rbm.w.T + rbm.b).sigmoid()


def gibbs_step(rbm: RBM, v: Float[Tensor, "B V"], *, rng: torch.Generator) -> Float[Tensor, "B V"]:
    """Draw all hidden units given the visible ones, then all visible units given those: one step of the chain."""
    h = torch.bernoulli(hidden_probability(rbm, v), generator=rng)
    return torch.bernoulli(visible_probability(rbm, h), generator=rng)


def eq2_term(rbm: RBM, v: Float[Tensor, "B V"]) -> RBM:
    """p(h_j = 1 given v) v_i, the first term of eq. 2, averaged over the batch; beside it those of b_i and c_j."""
    return _moments(rbm, v, v.new_full((len(v),), 1 / len(v)))


def contrast(rbm: RBM, v: Float[Tensor, "B V"], v_model: Float[Tensor, "M V"]) -> RBM:
    """Eq. 2 with the model's expectation replaced by an average over ``v_model``."""
    return _difference(eq2_term(rbm, v), eq2_term(rbm, v_model))


def cd_gradient(rbm: RBM, v: Float[Tensor, "B V"], *, rng: torch.Generator, steps: int = 1) -> RBM:
    """Contrastive divergence CD-``steps``: eq. 2 with ``v_model`` a few Gibbs steps away from the data.

    Source: Hinton 2002.  Raises ValueError for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1: with 0 the two terms cancel")
    v_model = v
    for _ in range(steps):
        v_model = gibbs_step(rbm, v_model, rng=rng)
    return contrast(rbm, v, v_model)


def ascend(rbm: RBM, gradient: RBM, rate: float) -> RBM:
    """The RBM after one step of length ``rate`` along ``gradient``."""
    return RBM(*(value + rate * slope for value, slope in zip(rbm, gradient)))


def train_rbm(
    rbm: RBM, v: Float[Tensor, "N V"], settings: RBMSettings = RBMSettings(), *, rng: torch.Generator
) -> Iterator[Step]:
    """Train ``rbm`` in place on binary ``v`` by contrastive divergence; yield after every update.

    The loss is the mean squared error of the reconstruction: a sign of life, not what is minimised.
    """
    require_shape(v, (None, len(rbm.b)), "v", "[images, visible units of the RBM]")
    steps, done, chains = settings.epochs * -(-len(v) // settings.batch), 0, v[: settings.batch]
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(v), generator=rng).split(settings.batch):
            batch, rate = v[rows], settings.learning_rate * (1 - done / steps)
            chains = gibbs_step(rbm, chains if settings.persistent else batch, rng=rng)
            gradient = contrast(rbm, batch, chains)
            gradient.w.sub_(settings.weight_decay * rbm.w)
            loss = (batch - visible_probability(rbm, hidden_probability(rbm, batch))).square().mean().item()
            for value, slope in zip(rbm, gradient):
                value.add_(slope, alpha=rate)
            done += 1
            yield Step(done, steps, loss, rate)


def all_states(units: int) -> Float[Tensor, "states units"]:
    """Every state of that many binary units, one a row.  Raises ValueError for more than 16 units."""
    if units > _MOST_UNITS:
        raise ValueError(f"{units} units have 2^{units} states; enumeration is for at most {_MOST_UNITS} units")
    numbers = torch.arange(2**units)[:, None]
    return (numbers >> torch.arange(units - 1, -1, -1) & 1).to(torch.get_default_dtype())


def log_z(rbm: RBM) -> Float[Tensor, ""]:
    """log Z, exactly, by enumerating the smaller layer.  Raises ValueError if both have more than 16 units."""
    small = _smaller_visible(rbm)
    return (-free_energy(small, _states_of(small))).logsumexp(0)


def log_likelihood(rbm: RBM, v: Float[Tensor, "B V"]) -> Float[Tensor, "B"]:
    """log p(v) in nats, exactly.  Raises ValueError if both layers have more than 16 units."""
    return -free_energy(rbm, v) - log_z(rbm)


def model_term(rbm: RBM) -> RBM:
    """The second term of eq. 2, the model's expectation, exactly.  Raises ValueError if both layers exceed 16 units."""
    small = _smaller_visible(rbm)
    states = _states_of(small)
    moments = _moments(small, states, (-free_energy(small, states)).softmax(0))
    return moments if small is rbm else _flip(moments)


def exact_gradient(rbm: RBM, v: Float[Tensor, "B V"]) -> RBM:
    """The gradient of the mean log likelihood of ``v``.  Eq. 2, both terms exact."""
    return _difference(eq2_term(rbm, v), model_term(rbm))


def _moments(rbm: RBM, v: Tensor, weight: Tensor) -> RBM:
    """Expectations of v_i h_j, v_i and h_j when row b of ``v`` has probability ``weight[b]``."""
    h, weighted = hidden_probability(rbm, v), weight[:, None] * v
    return RBM(weighted.T @ h, weighted.sum(0), weight @ h)


def _difference(first: RBM, second: RBM) -> RBM:
    return RBM(*(one - other for one, other in zip(first, second)))


def _flip(rbm: RBM) -> RBM:
    """The same machine with its two layers exchanged: eq. 1 treats them alike."""
    return RBM(rbm.w.T, rbm.c, rbm.b)


def _smaller_visible(rbm: RBM) -> RBM:
    return rbm if len(rbm.b) <= len(rbm.c) else _flip(rbm)


def _states_of(rbm: RBM) -> Tensor:
    return all_states(len(rbm.b)).to(rbm.w)


def save_rbm(rbm: RBM, path: Path, **facts) -> None:
    """Write ``rbm`` to ``path`` in half precision, with ``facts`` (seed, settings ...) inside."""
    checkpoints.write(path, {name: part.half() for name, part in rbm._asdict().items()}, **facts)


def load_rbm(path: Path | str) -> RBM:
    """The RBM that ``save_rbm`` wrote to ``path``, in single precision.

    Raises FileNotFoundError, or ValueError for another file.
    """
    tensors, _ = checkpoints.read(Path(path))
    if set(tensors) != set(RBM._fields):
        raise ValueError(f"{path} holds no RBM; make one with `python -m capsnb.baselines.rbm --out FILE`")
    return RBM(**{name: value.float() for name, value in tensors.items()})


def main(arguments: list[str] | None = None) -> None:
    """Train an RBM on binarised MNIST and write it."""
    parser = argparse.ArgumentParser(prog="python -m capsnb.baselines.rbm", description="Train an RBM on MNIST.")
    parser.add_argument("--out", type=Path, required=True, help="weight file to write")
    parser.add_argument("--epochs", type=int, default=SHIPPED.epochs, help="passes over the training images")
    parser.add_argument("--seed", type=int, default=0, help="of the binary images, the first weights and the chains")
    parser.add_argument("--quick", action="store_true", help="the shipped sample of 1,000 images: only for checks")
    options = parser.parse_args(arguments)
    rng, settings = torch.Generator().manual_seed(options.seed), replace(SHIPPED, epochs=options.epochs)
    v = binarise(data.load("mnist", "train", sample=options.quick)[0], rng=rng)
    rbm = new_rbm(v, SHIPPED_HIDDEN, rng=rng)
    for _ in tqdm(train_rbm(rbm, v, settings, rng=rng), total=settings.epochs * -(-len(v) // settings.batch)):
        pass
    save_rbm(rbm, options.out, settings=asdict(settings), seed=options.seed, images=len(v), versions=runs.versions())


if __name__ == "__main__":
    main()
