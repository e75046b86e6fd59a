"""The restricted Boltzmann machine, the product of experts that expert capsules are modelled on.  Section 2.1.

Axes: visible units i (V of them), hidden units j (H of them), all of them 0 or 1. The conditionals are those that
follow from eq. 1; the paper prints them with slips in indices and signs.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from capsnb import distributed
from capsnb.checks import require_images, require_shape
from capsnb.pretrained import WEIGHTS, load_network
from capsnb.training import Checkpoint, Step

PIXELS = 784
SHIPPED = WEIGHTS / "rbm.safetensors"
_MOST_UNITS = 16  # with 784 units in the other layer, a term for every state and unit takes 200 MB


class RBM(NamedTuple):
    """Weights w_ij, visible biases b_i, hidden biases c_j of eq. 1; also a gradient with respect to them."""

    w: Float[Tensor, "V H"]
    b: Float[Tensor, "V"]
    c: Float[Tensor, "H"]


@dataclass(frozen=True)
class RBMSettings:
    """How an RBM is trained; all values are ours, the paper trains none."""

    epochs: int | float = 10  # the pictures of chapter 2 change little after
    batch: int = 100
    learning_rate: float = 0.05  # decayed linearly to 0
    weight_decay: float = 1e-4  # on w only
    persistent: bool = False  # True: one Gibbs step an update of chains that are never restarted; False: CD-1


@dataclass(frozen=True)
class DigitRBMSettings(RBMSettings):
    """The RBM of binary images that ships, and how it is trained; size and kind are those of Salakhutdinov2008."""

    hidden: int = 500
    epochs: int | float = 50  # ours
    persistent: bool = True


class DigitRBM(nn.Module):
    """The RBM of 28 x 28 binary pixels as a module, whose weights can be stored and moved to another device."""

    def __init__(self, settings: DigitRBMSettings = DigitRBMSettings()):
        super().__init__()
        self.settings = settings
        for name, shape in zip(RBM._fields, ((PIXELS, settings.hidden), PIXELS, settings.hidden)):
            self.register_buffer(name, torch.zeros(shape))

    @property
    def rbm(self) -> RBM:
        """The weights and biases: the module's own, not copies."""
        return RBM(self.w, self.b, self.c)


def binarise(images: Float[Tensor, "B 1 28 28"], *, rng: torch.Generator) -> Float[Tensor, "B 784"]:
    """Every pixel 1 with its grey value as the probability, else 0.  Salakhutdinov2008.

    Raises ValueError for images outside [0, 1] or of another shape.
    """
    require_images(images)
    return torch.bernoulli(images.flatten(1), generator=rng)


def new_rbm(v: Float[Tensor, "N V"], hidden: int, *, rng: torch.Generator, deviation: float = 0.01) -> RBM:
    """An untrained RBM: small normal weights, and visible biases that make every unit as often 1 as it is in ``v``."""
    w = deviation * torch.randn(v.shape[1], hidden, generator=rng, device=rng.device).to(v)
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
    rbm: RBM,
    v: Float[Tensor, "N V"],
    settings: RBMSettings = RBMSettings(),
    *,
    rng: torch.Generator,
    checkpoint: Path | None = None,
) -> Iterator[Step]:
    """Train ``rbm`` in place on binary ``v`` by contrastive divergence; yield after every update.

    The loss is the mean squared error of the reconstruction: a sign of life, not what is minimised. With a
    ``checkpoint`` to go on from, weights, chains and the state of ``rng`` are those that it holds.
    """
    require_shape(v, (None, len(rbm.b)), "v", "[images, visible units of the RBM]")
    per_epoch = -(-len(v) // settings.batch)
    steps, order, chains = max(1, round(settings.epochs * per_epoch)), torch.arange(len(v)), v[: settings.batch]
    facts = {"settings": asdict(settings), "seed": rng.initial_seed(), "rows": len(v)}
    kept = Checkpoint(checkpoint, facts | {"device": rng.device.type})  # each kind draws other numbers
    saved, done = kept.read()
    if done:
        order, chains = _resume(rbm, saved, rng)
    for step in range(done, steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(v), generator=rng, device=rng.device)
        first, rate = step % per_epoch * settings.batch, settings.learning_rate * (1 - step / steps)
        batch = v[order[first : first + settings.batch]]
        chains = gibbs_step(rbm, chains if settings.persistent else batch, rng=rng)
        loss = _update(rbm, batch, chains, rate, settings.weight_decay)
        state = {"chains": chains, "order": order, "rng": rng.get_state()}
        kept.write(step + 1, steps, lambda: rbm._asdict() | state)  # noqa: B023
        yield Step(step + 1, steps, loss, rate)


def _update(rbm: RBM, batch: Tensor, chains: Tensor, rate: float, decay: float) -> float:
    """One step along eq. 2, in place; the error of the reconstruction before it."""
    gradient = contrast(rbm, batch, chains)
    gradient.w.sub_(decay * rbm.w)
    loss = (batch - visible_probability(rbm, hidden_probability(rbm, batch))).square().mean().item()
    for value, slope in zip(rbm, gradient):
        value.add_(slope, alpha=rate)
    return loss


def _resume(rbm: RBM, saved: dict[str, Tensor], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Put weights and random state back; the order of the images in this epoch, and the chains."""
    for value, name in zip(rbm, RBM._fields):
        value.copy_(saved[name])
    rng.set_state(saved["rng"])
    return saved["order"].to(rng.device), saved["chains"].to(rbm.w)


def train_digit_rbm(
    machine: DigitRBM, images: Float[Tensor, "N 1 28 28"], *, seed: int, checkpoint: Path | None = None
) -> Iterator[Step]:
    """Train ``machine`` on images made binary once, from small weights drawn first; yield after every update.

    Raises ValueError in several processes: an update is too small to be shared.
    """
    if distributed.world_size() > 1:
        raise ValueError("an RBM is trained in one process; start it without torchrun")
    rng = torch.Generator(machine.w.device).manual_seed(seed)
    v = binarise(images.to(machine.w), rng=rng)
    for value, start in zip(machine.rbm, new_rbm(v, machine.settings.hidden, rng=rng)):
        value.copy_(start)
    yield from train_rbm(machine.rbm, v, machine.settings, rng=rng, checkpoint=checkpoint)


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


def load_rbm(path: Path | str = SHIPPED) -> RBM:
    """The RBM in ``path``, in single precision.  Raises FileNotFoundError, or ValueError for another file."""
    return load_network(lambda content: DigitRBM(DigitRBMSettings(**content)), path).rbm
