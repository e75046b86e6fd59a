"""Draw the README's picture: samples of every capsule of the two default models, MNIST above Fashion-MNIST.

    python tools/draw_readme_picture.py

Each column is one capsule with all others zero; the poses are drawn from the mixture fitted to its training poses, and
nothing is picked. Writes book/_static/capsules.png.
"""

from pathlib import Path

import torch

from capsnb import load_pretrained
from capsnb.evaluation import single_capsule_images
from capsnb.explorer import png

TARGET = Path(__file__).parents[1] / "book" / "_static" / "capsules.png"
ROWS = 4


def main() -> None:
    """Write the picture."""
    rng = torch.Generator().manual_seed(0)
    images = [
        single_capsule_images(load_pretrained(name), ROWS, domain="fitted", rng=rng)
        for name in ("mnist", "fashion-mnist")
    ]
    TARGET.write_bytes(png(torch.cat(images), 2, gap=2))


if __name__ == "__main__":
    main()
