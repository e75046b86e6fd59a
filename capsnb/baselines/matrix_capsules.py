"""Matrix capsules: convolutional capsules and class capsules by EM routing, trained with labels.  Hinton2018.

Axes as in capsnb.baselines.em_routing; S is the number of pixels across an image.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from capsnb.baselines.em_routing import (
    MATRIX,
    POSE,
    Round,
    Routed,
    coordinates,
    em_routing,
    inverse_temperature,
    pose_votes,
    receptive_fields,
)
from capsnb.checks import require_images
from capsnb.classifier import shift_at_random
from capsnb.evaluation import CLASSES
from capsnb.native import fused
from capsnb.pretrained import WEIGHTS, load_network
from capsnb.training import Step, adam, batch_rows, minimise

_PART = 50  # images encoded at once, to bound memory
_ROUTED = 4  # images routed at once on a CPU: a third of the time that 32 take, whose votes leave no cache
_LONG = 200  # updates from which on compiling routing for the training, some ten seconds, pays
_KERNEL = 3  # positions across what a convolutional capsule sees
SHIPPED = WEIGHTS / "em-routing-mnist.safetensors"


@dataclass(frozen=True)
class EMRoutingSettings:
    """The network and its training; what has no comment is that of the paper's small network of 68,000 parameters."""

    size: int = 28  # pixels across an image; the paper's smallNORB crops have 32
    filters: int = 64  # A
    primary: int = 8  # B, types of capsules
    first: int = 16  # C
    second: int = 16  # D
    classes: int = CLASSES  # the paper's data have 5
    rounds: int = 3
    # The authors' 0.01 (in answer to a question at the paper's review) times the factor of 100 by which Gritzman2019
    # multiplies costs, after dividing them by the number of lower capsules for every upper one.
    final_lambda: float = 1.0
    first_margin: float = 0.2
    last_margin: float = 0.9
    margin_updates: int = 2000  # over which the margin rises evenly; ours, the paper names none
    shift: int = 2  # pixels by which training images are moved at most, each way; ours
    epochs: float = 5.0  # ours: less than an hour of a processor core
    batch: int = 64  # that of the paper's authors
    learning_rate: float = 3e-2  # Adam, warmed up and decayed to 0; ours: 3e-3 and 1e-2 learnt more slowly


LARGE = EMRoutingSettings(filters=32, primary=32, first=32, second=32)  # A to D of the paper's best network
SHORT = EMRoutingSettings(rounds=2, epochs=12.0)  # ours: about an hour and a half of a processor core


class CapsuleLayer(nn.Module):
    """Upper capsules of some types at every position that a kernel reaches, by EM routing.

    With ``shared`` W is the same at all places within the kernel and votes are told where they come from: so the class
    capsules, whose kernel is all of the layer below.
    """

    def __init__(self, lower: int, upper: int, across: int, kernel: int, stride: int, shared: bool, settings):
        super().__init__()
        self.settings, self.places = settings, kernel**2 if shared else 1
        inputs = lower if shared else kernel**2 * lower
        self.W = nn.Parameter(torch.randn(inputs, upper, *MATRIX))  # ours; half as large learns more slowly
        self.beta_u, self.beta_a = nn.Parameter(torch.zeros(upper)), nn.Parameter(torch.zeros(upper))
        self.cost_scale = upper / (kernel**2 * lower)
        self.register_buffer("fields", receptive_fields(across, kernel, stride, lower), persistent=False)
        added = coordinates(kernel, lower) if shared else torch.zeros(1, POSE)
        self.register_buffer("added", added, persistent=False)

    def forward(self, poses: Float[Tensor, "B N H"], activations: Float[Tensor, "B N"], history: bool = False):
        """The upper capsules; see ``em_routing``."""
        seen = poses.index_select(1, self.fields.flatten()).unflatten(1, self.fields.shape)
        votes = pose_votes(seen, self.W.repeat(self.places, 1, 1, 1)) + self.added.unsqueeze(1)
        options = {"rounds": self.settings.rounds, "final_lambda": self.settings.final_lambda, "history": history}
        betas = self.beta_u, self.beta_a
        return em_routing(votes, activations, *betas, children=self.fields, cost_scale=self.cost_scale, **options)


class EMRouting(nn.Module):
    """A convolution, primary capsules, two layers of convolutional capsules, class capsules.  Hinton2018, fig. 1."""

    def __init__(self, settings: EMRoutingSettings = EMRoutingSettings()):
        super().__init__()
        self.settings, a, b = settings, settings.filters, settings.primary
        self.convolution = nn.Sequential(nn.Conv2d(1, a, 5, stride=2), nn.BatchNorm2d(a), nn.ReLU())
        self.to_primary = nn.Conv2d(a, b * (POSE + 1), 1)
        across = [(settings.size - 5) // 2 + 1]
        across += [(across[0] - _KERNEL) // 2 + 1, (across[0] - _KERNEL) // 2 + 1 - (_KERNEL - 1)]
        self.first = CapsuleLayer(b, settings.first, across[0], _KERNEL, 2, False, settings)
        self.second = CapsuleLayer(settings.first, settings.second, across[1], _KERNEL, 1, False, settings)
        self.last = CapsuleLayer(settings.second, settings.classes, across[2], across[2], 1, True, settings)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # made so far: they set the margin

    def primary_capsules(self, images: Float[Tensor, "B 1 S S"]) -> tuple[Float[Tensor, "B N H"], Float[Tensor, "B N"]]:
        """Poses and activations of the primary capsules."""
        numbers = self.to_primary(self.convolution(images)).to(self.first.W).permute(0, 2, 3, 1)
        poses, logits = numbers.split([self.settings.primary * POSE, self.settings.primary], dim=3)
        return poses.unflatten(3, (-1, POSE)).flatten(1, 3), logits.sigmoid().flatten(1)

    def class_capsules(self, images: Float[Tensor, "B 1 S S"], history: bool = False) -> Routed:
        """One capsule for each class, all at one position; ``history`` is that of their routing."""
        poses, activations = self.primary_capsules(images)
        count = _ROUTED if images.device.type == "cpu" else len(images)
        with torch.autocast(images.device.type, enabled=False):
            parts = [self.route(*part, history) for part in zip(poses.split(count), activations.split(count))]
        joined = (torch.cat([part[at] for part in parts]) for at in range(3))
        rounds = zip(*(part.history for part in parts))
        return Routed(*joined, tuple(Round(*map(torch.cat, zip(*steps))) for steps in rounds))

    def route(self, poses: Float[Tensor, "B N H"], activations: Float[Tensor, "B N"], history: bool) -> Routed:
        """From primary to class capsules."""
        for layer in (self.first, self.second):
            poses, activations = (part.flatten(1, 2) for part in layer(poses, activations)[:2])
        return self.last(poses, activations, history)

    @torch.no_grad()
    def balance(self, images: Float[Tensor, "B 1 S S"]) -> None:
        """Set every beta_a so that about half of the capsules of a type are active in ``images``.

        The paper's authors had their first weights so; without it the activations of a layer begin near 1 together.
        """
        temperature = inverse_temperature(self.settings.rounds - 1, self.settings.final_lambda)
        capsules = self.primary_capsules(images)
        for layer in (self.first, self.second, self.last):
            layer.beta_a -= layer(*capsules).logits.flatten(0, 1).median(0).values / temperature
            capsules = [part.flatten(1, 2) for part in layer(*capsules)[:2]]

    def forward(self, images: Float[Tensor, "B 1 S S"], labels: Float[Tensor, "B"]) -> Float[Tensor, ""]:
        """The training loss per image, of images each moved at random; every call in training raises the margin."""
        moved, labels = shift_at_random(images, self.settings.shift), labels.long()
        activations = self.class_capsules(moved).activations.squeeze(1)
        loss = spread_loss(activations, labels, margin(int(self.updates), self.settings)).mean()
        if self.training:
            self.updates += 1
        return loss

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 1 S S"]) -> tuple[Float[Tensor, "B J H"], Float[Tensor, "B J"]]:
        """Poses and activations of the classes.  Raises ValueError for images outside [0, 1] or of another size."""
        require_images(images, self.settings.size)
        parts = [self.class_capsules(part)[:2] for part in images.split(_PART)]
        poses, activations = (torch.cat(part).squeeze(1) for part in zip(*parts))
        return poses, activations


def spread_loss(
    activations: Float[Tensor, "B J"], labels: Int[Tensor, "B"], least: float
) -> Float[Tensor, "B"]:
    """The squares of what the right class lacks of being ``least`` more active than another.  Hinton2018, eq. 3."""
    lead = activations.gather(1, labels.unsqueeze(1)) - activations
    others = 1 - F.one_hot(labels, activations.shape[1]).to(activations)
    return ((least - lead).relu().square() * others).sum(1)


def margin(updates: int, settings: EMRoutingSettings) -> float:
    """The spread loss's margin after some updates: a small one first, so that few capsules die early."""
    done = min(1.0, updates / settings.margin_updates)
    return settings.first_margin + done * (settings.last_margin - settings.first_margin)


def train_em_routing(
    network: EMRouting,
    images: Float[Tensor, "N 1 S S"],
    labels: Int[Tensor, "N"],
    *,
    seed: int,
    checkpoint: Path | None = None,
) -> Iterator[Step]:
    """Fit ``network`` to labelled images, its activations balanced first; yield after every update."""
    require_images(images, network.settings.size)
    first = images[batch_rows(len(images), network.settings.batch, 0, seed)].to(network.first.W)
    if not (checkpoint and checkpoint.exists()):
        network.balance(first)
    plan = adam(network, len(images))
    if plan.steps >= _LONG:
        capsules = network.primary_capsules(first[:_ROUTED] if first.device.type == "cpu" else first)
        network.route = fused(network.route, *capsules, False)
    try:
        yield from minimise(network, (images, labels), plan, seed=seed, checkpoint=checkpoint)
    finally:
        network.__dict__.pop("route", None)


def load_em_routing(path: Path = SHIPPED) -> EMRouting:
    """The network in ``path``, in evaluation mode on the CPU.

    Raises FileNotFoundError, or ValueError for another file.
    """
    return load_network(lambda content: EMRouting(EMRoutingSettings(**content)), path)
