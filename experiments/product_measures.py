"""What is measured of capsules on S^m x R^n x (0, 1), and the linear read-out that makes pictures of them."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from capsnb import squash
from capsnb.evaluation import is_negative, winner
from capsnb.model import ExpertCapsules
from capsnb.product_capsules import DOMAINS, ProductEncoder, Space, sample_states, split, states_of, with_activation
from capsnb.sampling import Poses, one_at_a_time
from capsnb.training import ridge_regression

SHOWN = 3  # samples of every capsule that are kept as pictures
STEPS = 13  # pictures of a sweep


class Encoded(NamedTuple):
    """A split after stage 2: the upper capsules before the squash, the one that is on and its own z, the states."""

    z: Float[Tensor, "N J d"]
    on: Int[Tensor, "N"]
    own: Float[Tensor, "N d"]
    states: Float[Tensor, "N J d"]


def encode(encoder: ProductEncoder, lower: Float[Tensor, "N I e"]) -> Encoded:
    """All of ``lower`` through stage 2."""
    z = torch.cat([encoder.preactivations(squash(part.float())) for part in lower.split(500)])
    on = winner(z)
    return Encoded(z, on, z[torch.arange(len(z)), on], states_of(z, encoder.space))


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
    train: Encoded, test: Encoded, strokes: tuple[dict[str, Tensor], dict[str, Tensor]], space: Space
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
    """Stage 3: a linear map from states, with the activation as one more number if ``activation``, to images."""

    model: ExpertCapsules
    matrix: Float[Tensor, "n m"]
    space: Space
    activation: bool

    def code(self, states: Float[Tensor, "*axes J d"]) -> Float[Tensor, "*axes n"]:
        """The numbers that the map is applied to."""
        return (with_activation(states, self.space) if self.activation else states).flatten(-2)

    @torch.no_grad()
    def alone(self, states: Float[Tensor, "rows J d"]) -> Float[Tensor, "rows J 28 28"]:
        """Images of layers with one capsule on."""
        z = self.code(one_at_a_time(states)).flatten(0, 1) @ self.matrix
        images = [self.model.image(part.view(len(part), *self.lower)) for part in z.split(250)]
        return torch.cat(images).view(*states.shape[:2], 28, 28)

    @property
    def lower(self) -> tuple[int, int]:
        """I and e of the lower layer."""
        return self.model.encoder.W.shape[0], self.model.encoder.W.shape[3]


def read_out(model: ExpertCapsules, states: Tensor, lower: Tensor, space: Space, *, activation: bool = True) -> ReadOut:
    """The ridge regression of the ``lower`` capsules on the states, with the ridge of the model's settings."""
    empty = ReadOut(model, torch.empty(0, 0), space, activation)
    matrix = ridge_regression(empty.code(states), lower, ridge=model.settings.decoder.ridge)
    return empty._replace(matrix=matrix)


def variance_left(reader: ReadOut, states: Float[Tensor, "N J d"], lower: Float[Tensor, "N I e"]) -> float:
    """The squared error of the read-out, as a share of the variance of the ``lower`` capsules."""
    error, mean = 0.0, lower.flatten(1).float().mean(0)
    for part, z in zip(states.split(500), lower.flatten(1).split(500)):
        error += (reader.code(part) @ reader.matrix - z).square().sum().item()
    return error / sum((z - mean).square().sum().item() for z in lower.flatten(1).split(500))


def sample_measures(
    reader: ReadOut, poses: Poses, real: Tensor, *, rows: int = 50, seed: int
) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """Share of negatives, contrast and differences within capsules of samples in every domain, and some pictures."""
    measures, images = {}, {}
    for domain in DOMAINS:
        rng = torch.Generator().manual_seed(seed)
        drawn = reader.alone(sample_states(rows, poses, reader.space, domain=domain, rng=rng))
        measures[domain] = {
            "negative_share": is_negative(drawn.flatten(0, 1).unsqueeze(1), real).float().mean().item(),
            "contrast": drawn.flatten(2).std(2).mean().item(),
            "variation_within_capsule": drawn.std(0).mean().item(),
        }
        images[domain] = as_bytes(drawn[:SHOWN])
    return measures, images


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


def as_bytes(images: Float[Tensor, "*axes"]) -> Tensor:
    """Images in [0, 1] as numbers from 0 to 255."""
    return (255 * images).round().to(torch.uint8)
