"""What is measured of capsules on S^m x R^n x (0, 1), and the linear read-out that makes pictures of them."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from capsnb import squash
from capsnb.evaluation import is_negative, winner
from capsnb.model import ExpertCapsules
from capsnb.product_capsules import (
    DOMAINS,
    ProductEncoder,
    Space,
    euclidean_deviation,
    offset_like,
    sample_states,
    split,
    states_of,
    with_activation,
)
from capsnb.sampling import Poses, one_at_a_time
from capsnb.settings import DecoderSettings
from capsnb.strokes import area
from capsnb.training import ridge_regression
from experiments.common import pictures

SHOWN = 3  # samples of every capsule that are kept as pictures
STEPS = 13  # pictures of a sweep


class Encoded(NamedTuple):
    """A split after stage 2: the states, the capsule that is on, and its own z."""

    states: Float[Tensor, "N J d"]
    on: Int[Tensor, "N"]
    own: Float[Tensor, "N d"]


def encode(encoder: ProductEncoder, lower: Float[Tensor, "N I e"]) -> Encoded:
    """All of ``lower`` through stage 2."""
    z = torch.cat([encoder.preactivations(squash(part.float())) for part in lower.split(500)])
    on = winner(z)
    return Encoded(states_of(z, encoder.space), on, z[torch.arange(len(z)), on])


def mean_direction(found: Encoded, space: Space) -> float:
    """Length of a capsule's mean point on its sphere, over capsules by share: 0 is all around, 1 a single point."""
    points = F.normalize(split(found.own, space)[0], dim=1)
    sums = points.new_zeros(found.states.shape[1], points.shape[1]).index_add(0, found.on, points)
    return (torch.linalg.vector_norm(sums, dim=1).sum() / len(points)).item()


def sign_known(found: Encoded, space: Space) -> float:
    """The share of images with a lower free energy than their negatives, under the same couplings.  Eq. 21.2."""
    t = split(found.own, space)[1]
    return ((offset_like(t, space) * t).sum(1) > 0).float().mean().item()


def euclidean_measures(poses: Poses, space: Space) -> dict[str, float]:
    """Where r lies in training: its mean on the offset's axis and off it, over capsules by share, and its deviation."""
    mean, share = split(poses.mean, space)[1], poses.share / poses.share.sum()
    return {
        "mean_on_axis": (share * mean[:, :1].sum(1)).sum().item(),
        "mean_off_axis": (share * torch.linalg.vector_norm(mean[:, 1:], dim=1)).sum().item(),
        "deviation": euclidean_deviation(poses, space).item(),
    }


def features(own: Float[Tensor, "N d"], space: Space) -> dict[str, Tensor]:
    """What may tell a measurement: direction, Euclidean part, activation (its logit, as it is nearly 1), or all."""
    s, t = split(own, space)
    found = {"direction": F.normalize(s, dim=1), "activation": s.square().sum(1, keepdim=True).clamp(min=1e-30).log()}
    found |= {"line": t} if t.shape[1] else {}
    return found | {"all": torch.cat(list(found.values()), dim=1)}


def explained_share(train: tuple[Tensor, Tensor, Tensor], test: tuple[Tensor, Tensor, Tensor]) -> float:
    """The share of the test variance of a measurement within capsules that a linear fit for each capsule explains.

    Each split is (features [N, f], measurement [N], the capsule that is on [N]). The variance is that about the
    capsule's training mean; a capsule with fewer than 10 training images per coefficient is left out.
    """
    error = variance = 0.0
    for j in train[2].unique():
        (x, y), (x_test, y_test) = ((part[0][part[2] == j], part[1][part[2] == j].double()) for part in (train, test))
        if len(x) >= 10 * (x.shape[1] + 1):
            x, x_test = (F.pad(each.double(), (1, 0), value=1.0) for each in (x, x_test))
            fit = torch.linalg.lstsq(x, y.unsqueeze(1)).solution.squeeze(1)
            error += (x_test @ fit - y_test).square().sum().item()
            variance += (y_test - y.mean()).square().sum().item()
    return 1 - error / variance if variance else 0.0


def explained(
    train: Encoded, test: Encoded, strokes: list[dict[str, Tensor]], space: Space
) -> dict[str, dict[str, float]]:
    """``explained_share`` of all ``strokes`` (of training images, of test images) by every part of a capsule."""
    of_train, of_test = features(train.own, space), features(test.own, space)
    return {
        name: {
            key: explained_share((x, strokes[0][name], train.on), (of_test[key], strokes[1][name], test.on))
            for key, x in of_train.items()
        }
        for name in strokes[0]
    }


class ReadOut(NamedTuple):
    """Stage 3: a linear map from states, with the activations beside them if ``activation``, to lower capsules."""

    model: ExpertCapsules
    matrix: Float[Tensor, "n m"]
    activation: bool

    def code(self, states: Float[Tensor, "*axes J d"]) -> Float[Tensor, "*axes J numbers"]:
        """The numbers that the map is applied to."""
        return with_activation(states, self.model.encoder.space) if self.activation else states

    def alone(self, states: Float[Tensor, "rows J d"]) -> UInt8[Tensor, "rows J 28 28"]:
        """Images of layers with one capsule on."""
        return pictures(self.model, self.matrix, self.code(one_at_a_time(states)))


def read_out(model: ExpertCapsules, states: Tensor, lower: Tensor, *, activation: bool = True) -> ReadOut:
    """The ridge regression of the ``lower`` capsules on the states."""
    empty = ReadOut(model, torch.empty(0, 0), activation)
    code = empty.code(states).flatten(1)
    return empty._replace(matrix=ridge_regression(code, lower, ridge=DecoderSettings().ridge))


def sample_measures(
    reader: ReadOut, real: Float[Tensor, "N 1 28 28"], *, rows: int = 50, seed: int
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """Share of negatives, contrast and differences within capsules of samples in every domain, and some pictures."""
    model, measures, images = reader.model, {}, {}
    for domain in DOMAINS:
        rng = torch.Generator().manual_seed(seed)
        images[domain] = reader.alone(sample_states(rows, model.poses, model.encoder.space, domain=domain, rng=rng))
        drawn = images[domain] / 255
        measures[domain] = {
            "negative_share": is_negative(drawn.flatten(0, 1).unsqueeze(1), real).float().mean().item(),
            "contrast": drawn.flatten(2).std(2).mean().item(),
            "variation_within_capsule": drawn.std(0).mean().item(),
        }
    return measures, {domain: drawn[:SHOWN] for domain, drawn in images.items()}


def sweeps(states: Tensor, on: Tensor, sizes: Tensor, space: Space) -> dict[str, Float[Tensor, "steps J d"]]:
    """States that every capsule passes through when its ink is to grow, from those of the images that it wins.

    "circle": from the mean direction all the way round, from -180 to 180 degrees, towards the direction of the linear
    fit of the ink. "line": the same for the Euclidean part, from -6 to 6 standard deviations along its own linear fit.
    Whatever does not move stays at its mean, directions on the sphere. A capsule that wins no image stays zero.
    """
    kinds = ("circle", "line") if space.sphere < states.shape[2] else ("circle",)
    result = {kind: states.new_zeros(STEPS, *states.shape[1:]) for kind in kinds}
    for j in range(states.shape[1]):
        mine, ink = states[on == j, j], sizes[on == j]
        if len(mine) > 1:
            (s, r), grows = split(mine, space), ink - ink.mean()
            middle = F.normalize(s.mean(0), dim=0), r.mean(0)
            for kind in kinds:
                moved = _circle(s, grows, *middle) if kind == "circle" else _line(r, grows, *middle)
                result[kind][:, j] = moved
    return result


def _circle(s: Tensor, grows: Tensor, centre: Tensor, rest: Tensor) -> Tensor:
    towards = _slope(s, grows)
    towards = F.normalize(towards - (towards @ centre) * centre, dim=0)
    angle = torch.linspace(-torch.pi, torch.pi, STEPS).unsqueeze(1)
    return torch.cat([angle.cos() * centre + angle.sin() * towards, rest.expand(STEPS, -1)], dim=1)


def _line(r: Tensor, grows: Tensor, centre: Tensor, rest: Tensor) -> Tensor:
    slope, covariance = _slope(r, grows), r.T.cov().view(r.shape[1], r.shape[1])
    towards = covariance @ slope / (slope @ covariance @ slope).clamp(min=1e-30).sqrt()
    return torch.cat([centre.expand(STEPS, -1), rest + torch.linspace(-6, 6, STEPS).unsqueeze(1) * towards], dim=1)


def _slope(x: Tensor, y: Tensor) -> Tensor:
    """The linear fit of y to x about their means."""
    return torch.linalg.lstsq((x - x.mean(0)).double(), y.double().unsqueeze(1)).solution[:, 0].float()


def mean_ink(walk: UInt8[Tensor, "steps J 28 28"]) -> list[float]:
    """The ink of the pictures of every step, a mean over capsules."""
    return [area(pictures.unsqueeze(1) / 255).mean().item() for pictures in walk]
