"""smallNORB: photographs of fifty toys of five classes, from known viewpoints, read from its own files.  LeCun2004.

A file holds one matrix: a number that names the kind of its entries, the number of dimensions, at least three sizes
(those without a dimension are 1), then the entries; all whole numbers have 4 bytes, the lowest first.
"""

import gzip
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

NAME = "small-norb"
INFO = ("instance", "elevation", "azimuth", "lighting")  # columns of ``SmallNorb.info``, numbered as in the files
_PREFIX = {
    "train": "smallnorb-5x46789x9x18x6x2x96x96-training",
    "test": "smallnorb-5x01235x9x18x6x2x96x96-testing",
}
_KINDS = {0x1E3D4C55: np.dtype("u1"), 0x1E3D4C54: np.dtype("<i4")}  # the two of the six kinds that smallNORB uses
_PAGE = "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/"
_CLASSES = 5
_PART = 1000  # pairs made smaller at once, to bound memory


class SmallNorb(NamedTuple):
    """One split: pictures by the left and the right camera, classes 0 to 4, and how the toy stood (see ``INFO``)."""

    pairs: UInt8[Tensor, "B 2 S S"]
    labels: Int[Tensor, "B"]
    info: Int[Tensor, "B 4"]


def load(folder: Path, split: str) -> tuple[Float[Tensor, "views 1 half half"], Int[Tensor, "views"]]:
    """Every camera's picture as an image of its own, in [0, 1], at half its size across (48 pixels), and its class.

    Images 2n and 2n + 1 are the pair n. Raises FileNotFoundError and ValueError as ``read`` does.
    """
    pairs, labels, _ = read(folder, split)
    halves = [F.avg_pool2d(part.float() / 255, 2) for part in pairs.split(_PART)]
    return torch.cat(halves).flatten(0, 1).unsqueeze(1), labels.repeat_interleave(2)


def read(folder: Path, split: str) -> SmallNorb:
    """The three files of a split ("train" or "test"), each gzipped or not.

    Raises FileNotFoundError that says which files belong where, and ValueError for damaged files or such as do not
    belong together.
    """
    paths = [_find(folder, split, kind) for kind in ("dat", "cat", "info")]
    pairs, labels, info = (read_matrix(path) for path in paths)
    count, size = len(pairs), pairs.shape[-1]
    found = [tuple(part.shape) for part in (pairs, labels, info)]
    if found != [(count, 2, size, size), (count,), (count, len(INFO))]:
        raise ValueError(f"{folder} holds {split} matrices of sizes {found}, not pairs, classes and 4 facts for each")
    if pairs.dtype != torch.uint8 or not all(0 <= label < _CLASSES for label in labels.unique()):
        raise ValueError(f"{folder} holds {split} files of other entries than bytes and classes 0 to 4; fetch again")
    return SmallNorb(pairs, labels.long(), info.long())


def read_matrix(path: Path) -> Tensor:
    """The matrix in a file, uint8 or int32, unpacked if its name ends in .gz.  Raises ValueError for a damaged file."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, dimensions = struct.unpack_from("<2I", content)
        entries, sizes = _KINDS[magic], struct.unpack_from(f"<{max(3, dimensions)}I", content, 8)
        start, sizes = 8 + 4 * len(sizes), sizes[:dimensions]
        values = np.frombuffer(content, entries, offset=start).reshape(sizes)
    except (EOFError, KeyError, ValueError, gzip.BadGzipFile, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is not a complete matrix of bytes or integers ({error}); fetch it again") from error
    return torch.from_numpy(values.astype(entries.newbyteorder("=")))


def _find(folder: Path, split: str, kind: str) -> Path:
    plain = folder / f"{_PREFIX[split]}-{kind}.mat"
    for path in (plain, plain.with_name(f"{plain.name}.gz")):
        if path.exists():
            return path
    names = ", ".join(f"{prefix}-{kind}.mat" for prefix in _PREFIX.values() for kind in ("dat", "cat", "info"))
    raise FileNotFoundError(
        f"{folder} has no {plain.name}; put smallNORB's six files there, from {_PAGE}, gzipped (.gz) or not ({names}), "
        f"or set CAPSNB_DATA to a folder whose subfolder {folder.name} has them"
    )
