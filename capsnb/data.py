"""Images: torchvision's data sets, smallNORB, a folder of IDX files, the small real sample that ships with capsnb."""

import gzip
import os
import tempfile
import zlib
from contextlib import redirect_stdout
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file

from capsnb import small_norb

_CLASSES = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST, "kmnist": datasets.KMNIST}
_SAMPLES = Path(__file__).parent / "samples"
_PREFIX = {"train": "train", "test": "t10k"}
_READER_ERRORS = (AssertionError, ValueError, KeyError, RuntimeError, TypeError)  # torchvision's for damaged files

Split = tuple[Float[Tensor, "B 1 S S"], Int[Tensor, "B"]]


def load(dataset: str, split: str, *, sample: bool | None = None) -> Split:
    """Images in [0, 1] and labels of ``dataset``: "mnist", "fashion-mnist", "kmnist", "small-norb", or an IDX folder.

    ``split`` is "train" or "test". Data sets are looked for in the folder ``CAPSNB_DATA`` (default ~/.cache/capsnb) and
    downloaded by torchvision where they are missing, all but smallNORB: its files must lie in the folder small-norb
    there, and its images have 48 x 48 pixels where the others have 28 x 28 (see capsnb.small_norb).

    ``sample=True`` takes the shipped 1,000 images a split; None takes them in quick mode and, with a printed notice,
    where the data set cannot be had; False never does.
    Raises ValueError for an unknown name, FileNotFoundError where nothing is found.
    """
    if split not in _PREFIX:
        raise ValueError(f"unknown split {split!r}; choose 'train' or 'test'")
    if dataset not in (*_CLASSES, small_norb.NAME):
        return _load_folder(Path(dataset), split)
    if sample and not has_sample(dataset):
        raise ValueError(f"no sample of {dataset} ships with capsnb; leave out sample=True")
    if sample or (sample is None and is_quick() and has_sample(dataset)):
        return _load_folder(_SAMPLES / dataset, split)
    if dataset == small_norb.NAME:
        return small_norb.load(root() / dataset, split)
    try:
        return _load_torchvision(dataset, split)
    except (OSError, RuntimeError) as error:
        if sample is False or not has_sample(dataset):
            raise FileNotFoundError(_not_found(dataset, error)) from error
        print(f"{dataset} not found and not downloadable: using the 1,000 {split} images that ship with capsnb.")
        return _load_folder(_SAMPLES / dataset, split)


def is_quick() -> bool:
    """Whether the environment asks for quick runs (CAPSNB_QUICK set to anything but 0 or nothing)."""
    return os.environ.get("CAPSNB_QUICK", "0") not in ("", "0")


def full_or_quick(full, quick):
    """``quick`` in quick mode, else ``full``: how a notebook sets the size of what it runs."""
    return quick if is_quick() else full


def has_sample(dataset: str) -> bool:
    """Whether a sample of ``dataset`` ships with capsnb."""
    return (_SAMPLES / dataset).is_dir()


def root() -> Path:
    """The folder in which torchvision's data sets are looked for."""
    return Path(os.environ.get("CAPSNB_DATA") or Path.home() / ".cache" / "capsnb").expanduser()


def _load_torchvision(dataset: str, split: str) -> Split:
    """The files in torchvision's folder, after downloading them if they are not there."""
    folder = root() / _CLASSES[dataset].__name__ / "raw"
    if not all((folder / f"{_PREFIX[split]}-{name}-ubyte").exists() for name in ("images-idx3", "labels-idx1")):
        with redirect_stdout(None):  # torchvision prints every mirror that fails
            _CLASSES[dataset](str(root()), download=True)
    return _load_folder(folder, split)


def _load_folder(folder: Path, split: str) -> Split:
    if not folder.is_dir():
        names = ", ".join((*_CLASSES, small_norb.NAME))
        raise ValueError(f"unknown data set {str(folder)!r}; choose one of {names}, or a folder of four IDX files")
    images = _read(folder, f"{_PREFIX[split]}-images-idx3-ubyte", read_image_file)
    labels = _read(folder, f"{_PREFIX[split]}-labels-idx1-ubyte", read_label_file)
    if images.shape[1:] != (28, 28) or len(images) != len(labels):
        found = f"{tuple(images.shape)} images and {len(labels)} labels"
        raise ValueError(f"{folder} holds {found}; expected 28 x 28 images and one label each")
    return images[:, None].float() / 255, labels


def _read(folder: Path, name: str, reader) -> Tensor:
    plain, packed = folder / name, folder / f"{name}.gz"
    if not plain.exists() and not packed.exists():
        raise FileNotFoundError(f"{folder} has no {name} or {name}.gz; a data set folder needs four such IDX files")
    try:
        if plain.exists():
            return reader(str(plain))
        with tempfile.TemporaryDirectory() as scratch:
            unpacked = Path(scratch) / name
            unpacked.write_bytes(gzip.decompress(packed.read_bytes()))
            return reader(str(unpacked))
    except (EOFError, gzip.BadGzipFile, zlib.error, *_READER_ERRORS) as error:
        raise ValueError(f"{folder / name} is not a complete IDX file ({error}); fetch it again") from error


def _not_found(dataset: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return (
        f"{dataset} is not in {root()} and could not be downloaded ({reason}); set CAPSNB_DATA to a folder that holds "
        "it in torchvision's layout, or give a folder of four IDX files instead of a name"
    )
