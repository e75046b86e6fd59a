"""What the experiments on stage 2 share: how a trained variant is measured and pictured.

Everything is measured on the test images. The pictures, [.., 28, 28] of 8 bits, are decoded by linear read-outs of the
poses, made in the same way for sparse and dense variants: reconstructions from all capsules together, samples from the
one that is on.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from capsnb import data, runs, squash
from capsnb.baselines.matrix_capsules import EMRouting
from capsnb.evaluation import CLASSES, activation_measures, effective_rank, linear_probe, winner_measures
from capsnb.model import CapsuleEncoder, ExpertCapsules
from capsnb.sampling import Poses, one_at_a_time
from capsnb.settings import DecoderSettings, EncoderSettings
from capsnb.training import ridge_regression, train_encoder

ROWS = 4  # samples of every capsule
ALONE = 10_000  # training images for the read-outs of single capsules
QUICK_STEPS = 5
PART = 250  # rows that ``in_parts`` takes at once
TABLE = {
    "capsules_in_use": "in use",
    "purity": "purity",
    "effective_rank": "rank",
    "top_direction_cosine": "cosine",
    "routing_agreement": "agreement",
    "coupling_entropy": "entropy",
    "activation_mean": "activation",
    "linear_probe": "probe",
    "variance_left": "var. left",
}


class Split(NamedTuple):
    """A split of the data set, and stage 1's capsules of it before the squash: once for all variants, in 16 bits."""

    images: Float[Tensor, "N 1 28 28"]
    labels: Int[Tensor, "N"]
    lower: Float[Tensor, "N I e"]


def top_direction_cosine(W: Float[Tensor, "I J d e"]) -> float:
    """How alike the experts are: the mean |cosine| between the strongest directions of any two upper capsules.

    A capsule's strongest direction is the lower layer, as one vector of I·e numbers, that gives the longest z_j for its
    length when all couplings are equal: the first right singular vector of its [d, I·e] matrix.
    """
    top = torch.linalg.svd(W.permute(1, 2, 0, 3).flatten(2), full_matrices=False).Vh[:, 0]
    first, second = torch.triu_indices(len(top), len(top), offset=1)
    return (top @ top.T)[first, second].abs().mean().item()


def variance_left(
    read_out: Float[Tensor, "n m"], code: Float[Tensor, "N n"], target: Float[Tensor, "N m"]
) -> float:
    """The squared error of ``code @ read_out``, as a share of the variance of ``target`` about its mean over images."""
    error = variance = torch.zeros(())
    mean = target.to(code).mean(0)
    for c, t in zip(code.split(1000), target.split(1000)):
        error = error + (c @ read_out - t).square().sum()
        variance = variance + (t - mean).square().sum()
    return (error / variance).item()


def routing_measures(encoder: CapsuleEncoder, lower: Float[Tensor, "N I e"]) -> dict[str, float]:
    """Of the routing before any capsule is turned off: how well the votes agree, and the entropy of the couplings.

    Agreement is the mean resultant length of the votes, a mean over capsules and images. The entropy is that of the
    couplings that sum to 1, a mean over these sums and images, as a share of the largest possible: 1 is no preference.
    """
    axis, agreement, entropy = {"upper": 2, "lower": 1}[encoder.settings.over], 0.0, 0.0
    for part in lower.split(250):
        state = encoder.route(squash(part.float()))
        agreement += state.agreement.mean(1).sum().item()
        entropy += torch.special.entr(state.coupling).sum(axis).mean(1).sum().item()
    most = torch.tensor(float(state.coupling.shape[axis])).log().item()
    return {"routing_agreement": agreement / len(lower), "coupling_entropy": entropy / most / len(lower)}


def fitted_layers(codes: Float[Tensor, "N J d"], rows: int, *, rng: torch.Generator) -> Float[Tensor, "rows J J d"]:
    """Layers with one capsule on: poses from the Gaussian fitted to its poses in the images it wins, at their length.

    Their length is the root of the mean squared length of those poses. A capsule that wins no image stays zero.
    """
    poses = Poses(*codes.shape[1:])
    poses.fit(codes)
    length = (poses.mean.square() + poses.covariance.diagonal(dim1=1, dim2=2)).sum(1, keepdim=True).sqrt()
    values, vectors = torch.linalg.eigh(poses.covariance)
    noise = torch.randn(rows, *poses.mean.shape, generator=rng) * values.clamp(min=0).sqrt()
    drawn = poses.mean + torch.einsum("jde,bje->bjd", vectors, noise)
    return one_at_a_time(length * F.normalize(drawn, dim=2))


def read_out_alone(codes: Float[Tensor, "N J d"], lower: Float[Tensor, "N I e"]) -> Float[Tensor, "n m"]:
    """What every capsule can say of the lower ones without the others, as one read-out for layers with one capsule on.

    Where one capsule is on for every image this is the joint read-out. A capsule that is never on says nothing.
    """
    nothing = codes.new_zeros(codes.shape[2], lower[0].numel())
    solved = [
        ridge_regression(pose, lower, ridge=DecoderSettings().ridge) if pose.any() else nothing
        for pose in codes.unbind(1)
    ]
    return torch.cat(solved)


def pictures(
    model: ExpertCapsules, read_out: Float[Tensor, "n m"], layers: Float[Tensor, "*axes J d"]
) -> Float[Tensor, "*axes 28 28"]:
    """Upper ``layers`` decoded by the linear ``read_out`` and the autoencoder, as 8-bit images."""
    axes, (lower, *_, dim) = layers.shape[:-2], model.encoder.W.shape
    z = layers.flatten(-2).flatten(0, -2) @ read_out
    with torch.no_grad():
        return as_bytes(model.image(z.view(-1, lower, dim))).view(*axes, 28, 28)


def in_parts(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``function`` of all rows, computed in parts to bound memory."""
    with torch.no_grad():
        return torch.cat([function(part) for part in rows.split(PART)])


def as_bytes(images: Float[Tensor, "N 1 28 28"]) -> Tensor:
    """Images in [0, 1] as numbers from 0 to 255."""
    return (255 * images[:, 0]).round().to(torch.uint8)


def as_vectors(network: EMRouting, images: Float[Tensor, "N 1 28 28"]) -> Float[Tensor, "N J d"]:
    """Matrix capsules as those of other systems are: each the direction of its pose, as long as its activation."""
    poses, activations = network.encode(images)
    return F.normalize(poses, dim=2) * activations.unsqueeze(2)


def one_of_each_class(labels: Int[Tensor, "N"]) -> list[int]:
    """The row of the first image of every class."""
    return [labels.tolist().index(label) for label in range(CLASSES)]


def untrained(name: str, chosen: EncoderSettings, stage1: ExpertCapsules, seed: int) -> ExpertCapsules:
    """A model with the autoencoder of ``stage1`` and an encoder with first weights drawn from ``seed``."""
    torch.manual_seed(seed)
    model = ExpertCapsules(replace(stage1.settings, preset=name, encoder=chosen))
    model.autoencoder = stage1.autoencoder
    return model


def fit(name: str, model: ExpertCapsules, lower: Tensor, seed: int) -> ExpertCapsules:
    """``model`` with its encoder trained on the ``lower`` capsules, as in ``runs``; shows a bar with the ``name``."""
    updates = train_encoder(model.encoder, lower, seed=seed)
    for _ in tqdm(updates, desc=name, total=model.encoder.settings.steps, leave=False, mininterval=1.0):
        pass
    return model.eval()


def measure(
    model: ExpertCapsules, train_split: Split, test: Split, seed: int
) -> tuple[dict[str, float | list], dict[str, Tensor]]:
    """All measures of a trained variant, and its pictures: samples of every capsule, and reconstructions."""
    codes, test_codes = (runs.upper_capsules(model.encoder, split.lower) for split in (train_split, test))
    read_out = ridge_regression(codes.flatten(1), train_split.lower, ridge=DecoderSettings().ridge)
    alone = fitted_layers(codes, ROWS, rng=torch.Generator().manual_seed(seed))
    shown = {
        "": (read_out_alone(codes[:ALONE], train_split.lower[:ALONE]), alone),
        "/reconstruction": (read_out, test_codes[one_of_each_class(test.labels)]),
    }
    measures = {
        **winner_measures(test_codes, test.labels),
        **activation_measures(test_codes),
        **routing_measures(model.encoder, test.lower),
        "effective_rank": effective_rank(model.encoder.W.detach()),
        "top_direction_cosine": top_direction_cosine(model.encoder.W.detach()),
        "linear_probe": linear_probe(codes, train_split.labels, test_codes, test.labels),
        "variance_left": variance_left(read_out, test_codes.flatten(1), test.lower.flatten(1)),
    }
    return measures, {end: pictures(model, matrix, layers) for end, (matrix, layers) in shown.items()}


def show_titles() -> None:
    """The head of the table."""
    print(f"{'':28s}{''.join(f'{title:>11s}' for title in TABLE.values())}  seconds", flush=True)


def show(name: str, record: dict) -> None:
    """One line of the table."""
    numbers = "".join(f"{record['measures'][key]:11.3g}" for key in TABLE)
    print(f"{name:28s}{numbers}{record['seconds']:9.0f}", flush=True)


def encoded(stage1: ExpertCapsules, split: str, quick: bool) -> Split:
    """A split of MNIST; quick runs take the shipped sample, others never do."""
    images, labels = data.load("mnist", split, sample=quick)
    rows = runs.Encoded(stage1, images)
    return Split(images, labels, torch.cat([rows[part].half() for part in torch.arange(len(images)).split(500)]))
