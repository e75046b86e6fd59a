"""Write the small sample that ships with capsnb: the first 100 training and test images of every class.

    python tools/make_samples.py

Needs both full data sets (see capsnb.data.load); writes four gzipped IDX files a data set into capsnb/samples/.
"""

import gzip
import struct
from pathlib import Path

import torch

from capsnb import data

PER_CLASS = 100
TARGET = Path(data.__file__).parent / "samples"


def idx(content: torch.Tensor) -> bytes:
    """An IDX file of unsigned bytes: magic number, sizes, content."""
    return struct.pack(f">HBB{content.ndim}I", 0, 8, content.ndim, *content.shape) + content.numpy().tobytes()


def main() -> None:
    """Write the sample of both data sets."""
    for dataset in ("mnist", "fashion-mnist"):
        for split, prefix in (("train", "train"), ("test", "t10k")):
            images, labels = data.load(dataset, split, sample=False)
            chosen = torch.cat([(labels == digit).nonzero()[:PER_CLASS, 0] for digit in range(10)]).sort().values
            pixels = (images[chosen, 0] * 255).round().to(torch.uint8)
            files = {"images-idx3": pixels, "labels-idx1": labels[chosen].to(torch.uint8)}
            for name, content in files.items():
                path = TARGET / dataset / f"{prefix}-{name}-ubyte.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(gzip.compress(idx(content), 9, mtime=0))


if __name__ == "__main__":
    main()
