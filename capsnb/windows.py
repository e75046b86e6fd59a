"""Where a model of 28 x 28 pixels looks in a larger frame: all windows in one pass, and the one that it answers most.

Stage 1 pads nothing and has strides 1 and 2. So the 6 x 6 positions of a window at an even offset are 6 x 6 of those
that it gives for the whole frame, and the upper capsules of all windows are a convolution of them with W.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from capsnb.capsules import from_capsules, squash, to_capsules
from capsnb.model import GRID, ExpertCapsules

SIDE = 28  # pixels each way of a window
STEP = 2  # pixels from one window to the next: the stride of stage 1

Frames = Float[Tensor, "B 1 height width"]
Places = Int[Tensor, "B 2"]  # row and column of the first pixel of a window; it may lie outside the frame


@torch.no_grad()
def lower_map(model: ExpertCapsules, frames: Frames) -> Float[Tensor, "B C rows columns"]:
    """The lower capsules x_i at every position of the frames, squashed, as one feature map."""
    features = model.autoencoder.encode(frames).float() - model.autoencoder.origin[:, :1, :1]
    scaled = model.settings.encoder.input_scale * features
    capsules = squash(to_capsules(scaled, model.settings.autoencoder.capsule_dim))
    return from_capsules(capsules, tuple(scaled.shape[1:]))


def window_capsules(
    x: Float[Tensor, "B C rows columns"], W: Float[Tensor, "I J d e"]
) -> Float[Tensor, "B J d down across"]:
    """z_j of every window of a ``lower_map``, for each capsule j as if it alone were on: eq. 3 as a convolution."""
    capsules, dim = W.shape[1:3]
    filters = W.unflatten(0, (*GRID, -1)).permute(3, 4, 2, 5, 0, 1).flatten(2, 3).flatten(0, 1)
    return F.conv2d(x, filters).unflatten(1, (capsules, dim))


def answers(z: Float[Tensor, "B J d down across"]) -> Float[Tensor, "B down across"]:
    """How strongly each window is answered: the length of its longest capsule before the squash, which keeps order."""
    return torch.linalg.vector_norm(z, dim=2).amax(1)


def best_window(answers: Float[Tensor, "B down across"]) -> Places:
    """The window with the strongest answer; of equals the first."""
    found, across = answers.flatten(1).argmax(1), answers.shape[2]
    return STEP * torch.stack([found // across, found % across], dim=1)


def crop(frames: Frames, places: Places) -> Float[Tensor, "B 1 28 28"]:
    """The windows at ``places``, at most 28 pixels outside the frame, where zeros come in."""
    windows = F.pad(frames, [SIDE] * 4).unfold(2, SIDE, 1).unfold(3, SIDE, 1)
    down, across = (places + SIDE).unbind(1)
    return windows[torch.arange(len(frames)), :, down, across]


def centre_of_mass(frames: Frames) -> Float[Tensor, "B 2"]:
    """Row and column of the ink's centre, in pixels from the first pixel's."""
    sums = frames.sum((1, 3)), frames.sum((1, 2))
    return torch.stack([(each * torch.arange(each.shape[1])).sum(1) / each.sum(1) for each in sums], dim=1)


def centred_window(frames: Frames) -> Places:
    """The window whose middle is the centre of mass, to whole pixels."""
    return (centre_of_mass(frames) - (SIDE - 1) / 2).round().long()
