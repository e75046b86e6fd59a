"""What each widget shows of its state, as bytes, computed with torch; ``web/compute.js`` says the same in a browser.

A state is a small dictionary, JSON as it stands; ``capsnb.explorer`` has the explorer's. Pictures are bytes of grey,
all other numbers float32. ``digits`` are the real test images by their number, each with its pixels and its code.
"""

import base64
import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from capsnb.capsules import squash
from capsnb.checks import require_choice
from capsnb.explorer import OFFSETS, decode_alone, require_number, shorten, shown_pose, strip
from capsnb.model import GRID, ExpertCapsules
from capsnb.movable import Model
from capsnb.routing import route_steps
from capsnb.sparsity import explanation

ROUNDS = 10  # of routing that are computed; the reader chooses one
SWING = 0.25  # how far the tour moves a number: as far as the strip reaches
Shown = dict[str, bytes]


def explorer(model: Model, state: dict, digits: dict[int, dict]) -> Shown:
    """The picture of a pose of one capsule, and the strip along one of its numbers."""
    images = strip(state, model)
    return {"picture": grey(images[len(OFFSETS) // 2]), "strip": grey(images)}


def tour(model: ExpertCapsules, state: dict, digits: dict[int, dict]) -> Shown:
    """A capsule's mean pose with one number moved, the strip along that number, and every number raised in turn.

    ``state["time"]`` runs from 0 to the number of dimensions: its whole part says which one moves, the rest how far.
    """
    capsules, dim = model.poses.mean.shape
    require_number(state["capsule"], capsules, "capsule")
    dimension = min(int(state["time"]), dim - 1)
    pose = model.poses.mean[state["capsule"]].clone()
    mean = state | {"pose": pose.tolist(), "domain": "complete", "dimension": dimension}
    pose[dimension] += SWING * math.sin(2 * math.pi * (state["time"] - dimension))
    moved = shown_pose(mean | {"pose": pose.tolist()}, model.poses)
    peaks = shorten(model.poses.mean[state["capsule"]] + SWING * torch.eye(dim))
    images = decode_alone(model, state["capsule"], torch.cat([moved[None], peaks]))
    return {"picture": grey(images[0]), "strip": grey(strip(mean, model)), "peaks": grey(images[1:])}


def walk(model: ExpertCapsules, state: dict, digits: dict[int, dict]) -> Shown:
    """The picture at ``state["share"]`` of the straight way between the codes of two images, and eleven on the way."""
    first, last = (torch.tensor(digit(digits, state[end])["code"]) for end in ("from", "to"))
    way = torch.tensor([state["share"], *(n / 10 for n in range(11))])[:, None]
    codes = (1 - way) * first + way * last
    images = model.decode(codes.view(-1, *model.poses.mean.shape))
    return {"picture": grey(images[0]), "strip": grey(images[1:])}


def routing(model: ExpertCapsules, state: dict, digits: dict[int, dict]) -> Shown:
    """Ten rounds of routing one image without the sparsity, and which capsule the trained model leaves on.

    ``maps`` are the couplings averaged over the lower capsules at each position, 1 for all alike: [rounds, J, 36].
    """
    require_choice(state["over"], ("upper", "lower"), "over")
    x, W = model.lower_capsules(_pixels(digit(digits, state["image"]))), model.encoder.W.detach()
    rounds = route_steps(x, W, rounds=ROUNDS, over=state["over"])
    unit = W.shape[1] if state["over"] == "upper" else W.shape[0]
    couplings = torch.stack([each.coupling[0].T for each in rounds])  # [rounds, J, I]
    maps = unit * couplings.unflatten(2, (GRID[0] * GRID[1], -1)).mean(3)
    firing = torch.linalg.vector_norm(squash(torch.cat([each.z for each in rounds])), dim=2)
    agreement = torch.cat([each.agreement for each in rounds])
    shown = {"maps": maps, "agreement": agreement, "firing": firing, "explanation": explanation(x, W)}
    return {name: numbers(tensor) for name, tensor in shown.items()}


def draw(model: ExpertCapsules, state: dict, digits: dict[int, dict]) -> Shown:
    """How well every capsule explains a drawing, how probable each is to fire, and what they send back."""
    if not state["ink"]:
        return {}
    image = read_ink(state["ink"])
    capsules, explained = model.encode(image), explanation(model.lower_capsules(image), model.encoder.W.detach())
    firing = torch.linalg.vector_norm(capsules, dim=2)
    answer = {"firing": numbers(firing), "explanation": numbers(explained)}
    return answer | {"picture": grey(model.decode(capsules))}


def digit(digits: dict[int, dict], number: int) -> dict:
    """The test image of that number.  Raises ValueError for one that is not among them."""
    if number not in digits:
        raise ValueError(f"test image {number} is not one of the {len(digits)} to choose from: {sorted(digits)}")
    return digits[number]


def write_ink(image: Float[Tensor, "1 28 28"]) -> str:
    """An image as a short text: 16 greys, two pixels in a byte, base64url; "" for the empty image."""
    levels = (15 * image).round().byte().flatten().numpy()
    pairs = (16 * levels[::2] + levels[1::2]).tobytes()
    return base64.urlsafe_b64encode(pairs).decode().rstrip("=") if levels.any() else ""


def read_ink(text: str) -> Float[Tensor, "1 1 28 28"]:
    """The image that ``write_ink`` wrote.  Raises ValueError for another text."""
    pairs = np.frombuffer(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), np.uint8)
    if len(pairs) != 28 * 28 // 2:
        raise ValueError(f"the ink holds {len(pairs)} bytes, expected {28 * 28 // 2}; make it with write_ink")
    return torch.tensor(np.stack([pairs >> 4, pairs & 15], axis=1)).float().view(1, 1, 28, 28) / 15


def grey(images: Float[Tensor, "*rows 28 28"]) -> bytes:
    """Images in [0, 1] as one byte a pixel."""
    return (255 * images).round().byte().numpy().tobytes()


def numbers(tensor: Tensor) -> bytes:
    """The float32 numbers of a tensor as bytes."""
    return tensor.detach().float().numpy().tobytes()


def _pixels(digit: dict) -> Float[Tensor, "1 1 28 28"]:
    return torch.tensor(digit["image"]).view(1, 1, 28, 28) / 255
