"""Affine MNIST: digits turned, slanted, stretched and moved in frames of 40 x 40 pixels.

The published set is Tieleman's affNIST (2013, https://www.cs.toronto.edu/~tijmen/affNIST/). Who has its files loads
them with ``load_original``; ``regenerate`` draws new ones with the published ranges, and everything it returns says so:
*regenerated, not the original files*. What of the recipe is ours stands in the docstrings.
"""

import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from torch import Tensor
from torch.nn import functional as F

from capsnb.affine import linear_maps, look_through

SIZE = 40  # pixels each way; affNIST
MARGIN = (SIZE - 28) // 2  # around a centred digit; affNIST
ROTATION = 20.0  # degrees at most, either way; affNIST
SHEAR = 0.2  # at most, either way; affNIST
SCALE = 0.2  # share by which each axis is stretched at most, for itself: 0.8 to 1.2; affNIST

REGENERATED = "affine MNIST (regenerated, not the original files)"
ORIGINAL = "affNIST (the original files)"
PLACED = "MNIST placed at random in 40 x 40"
CENTRED = "MNIST centred in 40 x 40"

_FOLDERS = {"train": ("training_batches", "training_and_validation_batches"), "test": ("test_batches",)}
_PART = 1000  # digits transformed at once, to bound memory
_DAMAGED = (MatReadError, NotImplementedError, TypeError, ValueError, OSError, zlib.error)  # what loadmat raises

Digits = Float[Tensor, "B 1 28 28"]
Frames = Float[Tensor, "B 1 40 40"]


@dataclass(frozen=True)
class FramedDigits:
    """Images in [0, 1] with their labels, and the ``name`` under which every table and figure shows them."""

    images: Frames
    labels: Int[Tensor, "B"]
    name: str

    @property
    def is_regenerated(self) -> bool:
        """Whether these are our stand-in for the published files."""
        return self.name == REGENERATED


@dataclass(frozen=True)
class Protocol:
    """What the encoder is trained on, what the classifier of its output is trained on, and what both are tested on."""

    encoder: FramedDigits
    classifier: FramedDigits
    test: FramedDigits

    @property
    def name(self) -> str:
        """All three by their names: regenerated digits cannot go unnoticed in a table."""
        return f"encoder: {self.encoder.name}; classifier: {self.classifier.name}; test: {self.test.name}"


def protocols(
    train: tuple[Float[Tensor, "N 1 28 28"], Int[Tensor, "N"]],
    test: tuple[Float[Tensor, "M 1 28 28"], Int[Tensor, "M"]],
    *,
    rng: torch.Generator,
    originals: str | Path | None = None,
) -> dict[str, Protocol]:
    """The three test conditions of Rawlinson 2018, Table 1, under "mnist", "a" and "b".

    The encoder always learns from MNIST alone, its digits placed at random in the frame and not otherwise transformed.
    In (a) the classifier learns from the encoder's output for affine digits, in (b) from its output for centred MNIST
    digits; both are tested on affine digits made of ``test``. "mnist" is the table's other column. That MNIST is
    centred whenever the classifier sees it is read from the paper's published code. There (a) trains and tests the
    classifier on different images of affNIST's test files, which may show the same digits; here the digits differ.
    ``originals`` is the folder of the original files; without it the affine digits are regenerated.
    """
    placed = place(*train, rng=rng)
    plain, plain_test = centre(*train), centre(*test)
    if originals is None:
        affine, affine_test = (regenerate(*split, rng=rng) for split in (train, test))
    else:
        affine, affine_test = (load_original(originals, split) for split in ("train", "test"))
    return {
        "mnist": Protocol(placed, plain, plain_test),
        "a": Protocol(placed, affine, affine_test),
        "b": Protocol(placed, plain, affine_test),
    }


def in_frame(images: Float[Tensor, "B 1 h w"], size: int = SIZE) -> Float[Tensor, "B 1 size size"]:
    """Images in the middle of empty frames of ``size`` pixels; larger ones stay as they are."""
    return F.pad(images, [max(size - images.shape[-1], 0) // 2] * 4)


def centre(digits: Digits, labels: Int[Tensor, "B"]) -> FramedDigits:
    """Every 28 x 28 image in the middle of an empty frame."""
    return FramedDigits(in_frame(digits), labels, CENTRED)


def place(digits: Digits, labels: Int[Tensor, "B"], *, rng: torch.Generator) -> FramedDigits:
    """Every 28 x 28 image at a random place of an empty frame, in whole pixels, as Sabour 2017 trains for affNIST."""
    windows = F.pad(digits, [2 * MARGIN] * 4).unfold(2, SIZE, 1).unfold(3, SIZE, 1)
    down, across = torch.randint(2 * MARGIN + 1, (2, len(digits)), generator=rng)
    return FramedDigits(windows[torch.arange(len(digits)), :, down, across], labels, PLACED)


def regenerate(digits: Digits, labels: Int[Tensor, "B"], *, rng: torch.Generator) -> FramedDigits:
    """Every digit under an affine map of its own, drawn evenly within the published ranges; no ink leaves the frame.

    The same state of ``rng`` gives the same frames, and the first ones do not depend on how many follow. affNIST has 32
    versions of every digit: repeat the digits for more than one. Ours are the order (stretch, slant, turn, move), the
    bilinear interpolation and the moves: evenly among all that keep every trace of ink inside.
    Raises ValueError for an image without ink, or with too much to fit.
    """
    frames = []
    for part in digits.split(_PART):
        shares = torch.rand(len(part), 6, generator=rng).to(part)
        maps = draw_maps(shares[:, :4])
        low, high = room(part, maps)
        frames.append(transform(part, maps, low + shares[:, 4:] * (high - low)))
    return FramedDigits(torch.cat(frames), labels, REGENERATED)


def draw_maps(shares: Float[Tensor, "B 4"]) -> Float[Tensor, "B 2 2"]:
    """The linear map of each row: how far in [0, 1] its rotation, shear and two scales lie within their ranges."""
    limits = shares.new_tensor([math.radians(ROTATION), SHEAR, SCALE, SCALE])
    angle, shear, across, down = (limits * (2 * shares - 1)).unbind(1)
    return linear_maps(angle, shear, 1 + across, 1 + down)


def room(digits: Digits, maps: Float[Tensor, "B 2 2"]) -> tuple[Float[Tensor, "B 2"], Float[Tensor, "B 2"]]:
    """The least and the greatest move (across, down), in pixels, that leave all of each mapped digit in the frame.

    Raises ValueError for an image without ink, or with so much that no move does.
    """
    axis = torch.arange(28).to(maps) - 13.5
    down, across = torch.meshgrid(axis, axis, indexing="ij")
    reached = maps @ torch.stack([across.flatten(), down.flatten()])
    empty = digits.flatten(2) == 0
    spread = maps.abs().sum(2)  # the interpolation spreads a pixel over the mapped square around it, two pixels wide
    edge = SIZE / 2 + 0.5  # the middle of the first pixels outside
    low = spread - edge - reached.masked_fill(empty, math.inf).amin(2)
    high = edge - spread - reached.masked_fill(empty, -math.inf).amax(2)
    if empty.all(2).any() or (low > high).any():
        raise ValueError("every image needs some ink that fits into 40 x 40 pixels when turned and stretched")
    return low, high


def transform(digits: Digits, maps: Float[Tensor, "B 2 2"], moves: Float[Tensor, "B 2"]) -> Frames:
    """The digits mapped about the middle of their images, then moved (across, down) by ``moves`` pixels."""
    back = torch.linalg.inv(maps)
    start = -back @ moves[..., None] * 2 / SIZE
    return look_through(in_frame(digits), torch.cat([back, start], dim=2))


def load_original(folder: str | Path, split: str, *, batches: int = 1) -> FramedDigits:
    """The first ``batches`` of the 32 original files of ``split`` ("train" or "test"), each with every digit once.

    ``folder`` holds the unpacked folders ``training_batches`` (or ``training_and_validation_batches``) and
    ``test_batches`` with 1.mat, 2.mat and so on. Raises FileNotFoundError where a file is missing, ValueError for an
    unknown split and for a file of another kind.
    """
    if split not in _FOLDERS:
        raise ValueError(f"unknown split {split!r}; choose 'train' or 'test'")
    found = [Path(folder) / name for name in _FOLDERS[split] if (Path(folder) / name).is_dir()]
    if not found:
        raise FileNotFoundError(f"{folder} has no folder {' or '.join(_FOLDERS[split])}; unpack affNIST's files there")
    parts = [_read(found[0] / f"{number}.mat") for number in range(1, batches + 1)]
    images, labels = (torch.cat(each) for each in zip(*parts))
    return FramedDigits(images, labels, ORIGINAL)


def _read(path: Path) -> tuple[Frames, Int[Tensor, "B"]]:
    """One file: a struct ``affNISTdata`` whose ``image`` holds a picture a column, row after row, as bytes."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; every folder of affNIST holds 1.mat to 32.mat")
    try:
        record = loadmat(path)["affNISTdata"][0, 0]
        images, labels = record["image"].T, record["label_int"].ravel()
    except (*_DAMAGED, KeyError, IndexError) as error:
        raise ValueError(f"{path} is not one of affNIST's files ({error}); fetch it again") from error
    if images.ndim != 2 or images.shape != (len(labels), SIZE**2):
        found = f"images of shape {images.T.shape} and {len(labels)} labels"
        raise ValueError(f"{path} holds {found}; expected [1600, count] bytes and one label each")
    frames = torch.from_numpy(np.ascontiguousarray(images)).view(-1, 1, SIZE, SIZE).float() / 255
    return frames, torch.from_numpy(labels.astype(np.int64))
