"""What does moving one number of one capsule do to the picture, and can it be named?

    python -m experiments.moving_dimensions --out capsnb/results/moving-dimensions.json
    python -m experiments.moving_dimensions --quick --out FILE      few poses on the sample: only for checks

For every capsule in use, and every one of its dimensions: take the poses of training images that the capsule wins, set
that one number to 11 evenly spaced values of its training range, and decode with all other capsules off. The range goes
from the 1st to the 99th percentile over the training images that the capsule wins. A pose that becomes longer than a
squashed capsule can be is shortened, as by the sliders of chapter 11.

The energy does not change when a capsule's poses are turned, so its axes are arbitrary. Beside the 16 "axes" the same
is done with axes "turned" at random, and with directions that turn with the poses: the 16 "principal" ones of the
training poses, the leading one first, and those "fitted" to each of the six measurements of handwriting by least
squares on the training images.

Of every direction the safetensors file holds, [capsules in use, directions]: "change", the mean absolute difference of
a pixel between the first and the last picture (black to white is 1); "jump", the largest change between neighbouring
pictures as a multiple of the mean one, in the worst of the sweeps; "kept", the share of the first and last pictures
that the same capsule wins when they are encoded; "range", its two ends; and for every measurement of handwriting its
Pearson correlation with the moved number, "sweep" in the decoded pictures (each sweep about its own mean) and "real" in
the test images that the capsule wins; "effect" is how much the last picture measures more than the first. "strips" are
the pictures of the strongest direction of every capsule, "clearest" those of each measurement's clearest direction,
both for the first pose drawn, [.., 11, 28, 28] of 8 bits. The JSON sums up.

The thresholds were set before anything was measured. Visible: the change is at least a quarter of the mean difference
between two test images that the capsule wins. Smooth: no jump above 3 (a change all in one step would be 10). Named:
both correlations with one measurement are at least 0.5 in size, with the same sign.
"""

import time
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from capsnb import data, load_pretrained
from capsnb.evaluation import IN_USE, winner
from capsnb.explorer import decode_alone, shorten
from capsnb.model import ExpertCapsules
from capsnb.strokes import MEASUREMENTS
from experiments import results
from experiments.common import as_bytes

MODELS = ("mnist", "fashion-mnist")
SETS = ("axes", "turned", "principal", "fitted")
RANGE, STEPS = (0.01, 0.99), 11
TRAINING = 10_000  # training images that are encoded
VISIBLE, LARGEST_JUMP, NAMED = 0.25, 3.0, 0.5
TABLE = ("visible", "smooth", "visible_and_smooth", "named")


class Sizes(NamedTuple):
    """How many poses every direction is swept from, and the capsules looked at, if they are in use."""

    starts: int = 4
    capsules: int = 1000


QUICK = Sizes(starts=2, capsules=3)
Tables = dict[str, Float[Tensor, "J *axes"]]


class Won(NamedTuple):
    """The images that one capsule wins, and its poses of them."""

    images: Float[Tensor, "N 1 28 28"]
    poses: Float[Tensor, "N d"]


def won(images: Float[Tensor, "N 1 28 28"], codes: Float[Tensor, "N J d"]) -> list[Won]:
    """Every capsule's images and poses."""
    mine = [winner(codes) == j for j in range(codes.shape[1])]
    return [Won(images[rows], codes[rows, j]) for j, rows in enumerate(mine)]


def measure_all(images: Float[Tensor, "N 1 28 28"]) -> Float[Tensor, "N 6"]:
    """All measurements of handwriting."""
    return torch.stack([measurement(images) for measurement in MEASUREMENTS.values()], dim=1)


def correlation(x: Float[Tensor, "N *axes"], y: Float[Tensor, "N *axes"]) -> Float[Tensor, "*axes"]:
    """Pearson's correlation over the first axis; 0 where one of the two does not vary."""
    x, y = (each - each.mean(0) for each in torch.broadcast_tensors(x, y))
    lengths = torch.linalg.vector_norm(x, dim=0) * torch.linalg.vector_norm(y, dim=0)
    return torch.where(lengths > 1e-9, (x * y).sum(0) / lengths.clamp(min=1e-9), 0)


def difference(images: Float[Tensor, "N 1 28 28"]) -> float:
    """The mean absolute difference of a pixel between two of the images: each one and the next."""
    return (images - images.roll(1, 0)).abs().mean().item()


def directions(
    train: Won, covariance: Float[Tensor, "d d"], *, rng: torch.Generator
) -> dict[str, Float[Tensor, "K d"]]:
    """Unit vectors to move along: the axes, axes turned at random, principal directions, fits to every measurement."""
    axes, centred, measured = torch.eye(len(covariance)), train.poses - train.poses.mean(0), measure_all(train.images)
    fit = torch.linalg.lstsq(centred, measured - measured.mean(0), driver="gelsd").solution.T
    turned = torch.linalg.qr(torch.randn(axes.shape, generator=rng)).Q
    principal = torch.linalg.eigh(covariance).eigenvectors.flip(1).T
    return {"axes": axes, "turned": turned, "principal": principal, "fitted": F.normalize(fit)}


def sweep(
    starts: Float[Tensor, "M d"], direction: Float[Tensor, "d"], values: Float[Tensor, "S"]
) -> Float[Tensor, "M S d"]:
    """Every pose with its coordinate along the unit ``direction`` set to each of the ``values``."""
    steps = values - (starts @ direction).unsqueeze(1)
    return shorten(starts.unsqueeze(1) + steps.unsqueeze(2) * direction)


def of_sweeps(pictures: Float[Tensor, "M S 1 28 28"], values: Float[Tensor, "S"]) -> dict[str, Tensor]:
    """What the pictures of the sweeps along one direction show: change, jump, and the measurements' way."""
    steps = pictures.diff(dim=1).abs().mean((2, 3, 4))
    measured = measure_all(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])
    within = (measured - measured.mean(1, keepdim=True)).flatten(0, 1)
    return {
        "change": (pictures[:, -1] - pictures[:, 0]).abs().mean(),
        "jump": (steps.amax(1) / steps.mean(1).clamp(min=1e-12)).max(),
        "sweep": correlation(values.repeat(len(pictures)).unsqueeze(1), within),
        "effect": (measured[:, -1] - measured[:, 0]).mean(0),
    }


def move(
    model: ExpertCapsules, j: int, train: Won, test: Won, direction: Float[Tensor, "d"], starts: Float[Tensor, "M d"]
) -> tuple[dict[str, Tensor], Float[Tensor, "S 1 28 28"]]:
    """Everything about one direction of capsule ``j``, and the pictures of its first sweep."""
    ends = (train.poses @ direction).quantile(torch.tensor(RANGE))
    values = ends[0] + torch.linspace(0, 1, STEPS) * (ends[1] - ends[0])
    poses = sweep(starts, direction, values)
    pictures = decode_alone(model, j, poses.flatten(0, 1)).unflatten(0, poses.shape[:2])
    again = winner(model.encode(pictures[:, [0, -1]].flatten(0, 1)))
    real = correlation((test.poses @ direction).unsqueeze(1), measure_all(test.images))
    found = of_sweeps(pictures, values) | {"kept": (again == j).float().mean(), "range": ends, "real": real}
    return found, pictures[0]


def explore(
    model: ExpertCapsules, train: list[Won], test: list[Won], sizes: Sizes, *, rng: torch.Generator
) -> tuple[list[int], dict[str, Tables], dict[str, Float[Tensor, "J K S 28 28"]]]:
    """The capsules in use, and for each set of directions its tables and all first sweeps."""
    images = sum(len(each.poses) for each in test)
    used = [j for j, each in enumerate(test) if len(each.poses) >= IN_USE * images][: sizes.capsules]
    rows, strips = {name: [] for name in SETS}, {name: [] for name in SETS}
    for j in tqdm(used, desc="capsules", leave=False, mininterval=1.0):
        chosen = torch.randint(len(train[j].poses), (sizes.starts,), generator=rng)
        for name, ways in directions(train[j], model.poses.covariance[j], rng=rng).items():
            moved = [move(model, j, train[j], test[j], way, train[j].poses[chosen]) for way in ways]
            rows[name].append({key: torch.stack([found[key] for found, _ in moved]) for key in moved[0][0]})
            strips[name].append(torch.stack([as_bytes(pictures) for _, pictures in moved]))
    tables = {name: {key: torch.stack([row[key] for row in rows[name]]) for key in rows[name][0]} for name in SETS}
    return used, tables, {name: torch.stack(strips[name]) for name in SETS}


def agreement(table: Tables) -> Float[Tensor, "J K 6"]:
    """The smaller of the two correlations in size, where they have the same sign; else 0."""
    same = table["real"] * table["sweep"] > 0
    return torch.where(same, torch.minimum(table["real"].abs(), table["sweep"].abs()), 0)


def describe(used: list[int], table: Tables, row: int, way: int, kind: int) -> dict:
    """One direction in words and numbers, with the measurement number ``kind``."""
    facts = {"capsule": used[row], "direction": way, "measurement": list(MEASUREMENTS)[kind]}
    single = {key: round(table[key][row, way].item(), 4) for key in ("change", "jump", "kept")}
    return facts | single | {key: round(table[key][row, way, kind].item(), 4) for key in ("real", "sweep", "effect")}


def summary(used: list[int], table: Tables, differences: Float[Tensor, "J"]) -> dict:
    """How many directions change the picture visibly and smoothly, how many have a name, and the strongest."""
    change, clear = table["change"], agreement(table)
    visible, smooth = change >= VISIBLE * differences.unsqueeze(1), table["jump"] <= LARGEST_JUMP
    named, kind = (clear.amax(2) >= NAMED), clear.argmax(2)
    best = [divmod(clear[..., k].argmax().item(), clear.shape[1]) for k in range(len(MEASUREMENTS))]
    strongest = [(row, way) for row, way in enumerate(change.argmax(1).tolist())]
    shares = {"visible": visible, "smooth": smooth, "visible_and_smooth": visible & smooth, "named": named}
    return {
        "directions": change.numel(),
        **{name: share.float().mean().item() for name, share in shares.items()},
        "change": {"smallest": change.min().item(), "median": change.median().item(), "largest": change.max().item()},
        "jump": {"median": table["jump"].median().item(), "largest": table["jump"].max().item()},
        "kept": table["kept"].mean().item(),
        "names": {name: int((named & (kind == k)).sum()) for k, name in enumerate(MEASUREMENTS)},
        "strongest": [describe(used, table, row, way, kind[row, way].item()) for row, way in strongest],
        "clearest": {name: describe(used, table, *best[k], k) for k, name in enumerate(MEASUREMENTS)},
        "changes": [[round(value, 4) for value in row] for row in change.tolist()],
    }


def pictures_of(found: dict, used: list[int], strips: Float[Tensor, "J K S 28 28"]) -> dict[str, Tensor]:
    """The strips of the strongest direction of every capsule, and of each measurement's clearest."""
    places = {"strips": found["strongest"], "clearest": found["clearest"].values()}
    return {
        name: torch.stack([strips[used.index(each["capsule"]), each["direction"]] for each in chosen])
        for name, chosen in places.items()
    }


class Results(results.Results):
    """As for every experiment; a model is finished if it was moved with the weights that are there now."""

    records = "models"

    def holds(self, name: str) -> bool:
        return super().holds(name, fingerprint=results.fingerprint(name))


def moved(name: str, found: Results) -> tuple[dict, dict[str, Tensor]]:
    """The record and the arrays of one model."""
    model, rng = load_pretrained(name), torch.Generator().manual_seed(found.seed)
    train, test = (data.load(name, split, sample=found.quick)[0] for split in ("train", "test"))
    train, test = (won(images, model.encode(images)) for images in (train[:TRAINING], test))
    used, tables, strips = explore(model, train, test, QUICK if found.quick else Sizes(), rng=rng)
    differences = torch.tensor([difference(test[j].images) for j in used])
    record, arrays = {"capsules": used, "differences": differences.tolist()}, {}
    for key, table in tables.items():
        record[key] = summary(used, table, differences)
        pictures = pictures_of(record[key], used, strips[key])
        arrays |= {f"{name}/{key}/{end}": array for end, array in (table | pictures).items()}
    return record, arrays


def run(found: Results, names: list[str]) -> None:
    """Move, measure and write every model of ``names`` that ``found`` lacks."""
    for name in names:
        if not found.holds(name):
            started, made_with = time.monotonic(), results.fingerprint(name)
            record, arrays = moved(name, found)
            facts = {"fingerprint": made_with, "seconds": round(time.monotonic() - started, 1)}
            found.add(name, facts | record, arrays)
        show(name, found.content["models"][name])


def show(name: str, record: dict) -> None:
    """One line for each set of directions."""
    for key in SETS:
        shares = "  ".join(f"{end} {record[key][end]:6.1%}" for end in TABLE)
        print(f"{name:14s} {key:10s} {record[key]['directions']:4d} directions  {shares}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    run(*results.command_line(__doc__, list(MODELS), arguments, Results))


if __name__ == "__main__":
    main()
