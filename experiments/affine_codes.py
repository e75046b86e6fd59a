"""What is seen of frames of 40 x 40, and the codes of it: for ``affine_mnist``."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from capsnb import data, load_pretrained, runs, squash, training
from capsnb.affine_mnist import FramedDigits
from capsnb.baselines.capsnet import CapsNet, load_capsnet, mask
from capsnb.baselines.matrix_capsules import load_em_routing
from capsnb.baselines.rbm import hidden_probability, load_rbm
from capsnb.baselines.sparse_capsules import SparseCapsules, load_sparse_capsules
from capsnb.baselines.vae import VAE, load_vae
from capsnb.evaluation import winner
from capsnb.model import CapsuleEncoder, ExpertCapsules
from capsnb.settings import quick
from capsnb.subspaces import principal_directions
from capsnb.windows import answers, best_window, centred_window, crop, lower_map, window_capsules
from experiments.common import as_vectors, fit, in_parts, untrained
from experiments.seeds import all_poses

MODEL = "mnist"
OUTSIDE = 8  # pixels by which a window may stick out of the frame, as those of thin digits at its edge do
COMPONENTS = 320  # of the principal component analysis: as many numbers as 20 capsules of 16 have
PART = 100  # frames searched at once
SEARCHES = {"windows": "trained", "random-windows": "random", "unviewed-windows": "unviewed"}  # by which W

Codes = Float[Tensor, "N ..."]
OfSet = Callable[[str], Codes]  # the code of a set by its name


def search(
    model: ExpertCapsules, W: Float[Tensor, "I J d e"], frames: Float[Tensor, "N 1 height width"]
) -> Int[Tensor, "N 2"]:
    """The window of every frame that the capsules with this ``W`` answer most."""
    found = []
    for part in frames.split(PART):
        with training.autocast(part.device):
            found.append(best_window(answers(window_capsules(lower_map(model, part), W))))
    return torch.cat(found)


@torch.enable_grad()  # codes are made without
def train_unviewed(model: ExpertCapsules, is_quick: bool, seed: int) -> CapsuleEncoder:
    """Another stage 2 for ``model``, which learns from the training images as they are and not from views of them."""
    settings = replace(model.settings, encoder=replace(model.settings.encoder, views=None))
    chosen = quick(settings).encoder if is_quick else settings.encoder
    images, _ = data.load("mnist", "train", sample=is_quick)
    return fit("unviewed", untrained("unviewed", chosen, model, seed), runs.Encoded(model, images), seed).encoder


class Views:
    """The shipped model, encoders to compare its own with, and what is seen of every set of frames, made when asked."""

    def __init__(self, sets: dict[str, FramedDigits], is_quick: bool, seed: int):
        self.sets, self.is_quick, self.seed = sets, is_quick, seed
        self.model, self.kept = load_pretrained(MODEL), {}

    def encoder(self, of: str) -> CapsuleEncoder:
        """The stage 2 that ships, or that has learned without views."""
        if of == "trained":
            return self.model.encoder
        return self.keep((of, ""), lambda: train_unviewed(self.model, self.is_quick, self.seed))

    def W(self, of: str) -> Float[Tensor, "I J d e"]:
        """The weights of an encoder, or "random" ones that deviate as those that ship."""
        if of != "random":
            return self.encoder(of).W.detach()
        W = self.model.encoder.W.detach()
        return W.std() * torch.randn(W.shape, generator=torch.Generator().manual_seed(self.seed))

    def frames(self, name: str) -> Float[Tensor, "N 1 H W"]:
        """The frames of a set, with room about them for windows that stick out."""
        return F.pad(self.sets[name].images, [OUTSIDE] * 4)

    def places(self, where: str, name: str) -> Int[Tensor, "N 2"]:
        """The windows of a set."""
        if where == "mass":
            return centred_window(self.frames(name))
        found = partial(search, self.model, self.W(SEARCHES[where]), self.frames(name))
        return self.keep((f"{where} places", name), found)

    def images(self, where: str, name: str) -> Float[Tensor, "N 1 h w"]:
        """What is seen of a set: its frames, or the windows."""
        return self.sets[name].images if where == "frame" else crop(self.frames(name), self.places(where, name))

    def lower(self, where: str, name: str) -> Float[Tensor, "N I e"]:
        """Stage 1's capsules in the windows of a set, squashed, in 16 bits."""
        return self.keep((where, name), lambda: self.encoded(self.images(where, name)))

    def encoded(self, images: Float[Tensor, "N 1 28 28"]) -> Float[Tensor, "N I e"]:
        """Stage 1's capsules of any images, squashed, in 16 bits."""
        rows = runs.Encoded(self.model, images)
        return torch.cat([squash(rows[part]).half() for part in torch.arange(len(images)).split(500)])

    def keep(self, key: tuple[str, str], make: Callable[[], Any]) -> Any:
        """What ``make`` gave for ``key`` when first asked."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]


# Codes: given the views and where, the code of a set by its name


def pixels(views: Views, where: str) -> OfSet:
    """The pixels themselves."""
    return lambda name: views.images(where, name).flatten(1)


def pca(views: Views, where: str) -> OfSet:
    """Principal components of the pixels, fitted to MNIST digits at random places."""
    known = pixels(views, where)("placed")
    mean, directions = known.mean(0), principal_directions(known - known.mean(0), COMPONENTS)
    return lambda name: (pixels(views, where)(name) - mean) @ directions


def one_on(of: str, views: Views, where: str) -> OfSet:
    """The capsules as ``ExpertCapsules.encode`` gives them: the one that explains most is on."""
    return lambda name: in_parts(lambda x: views.encoder(of).encode(x.float()), views.lower(where, name))


def all_on(of: str, views: Views, where: str) -> OfSet:
    """The pose that every capsule would have if it were the one that is on, with the given W."""
    W = views.W(of)
    return lambda name: in_parts(lambda x: all_poses(W, x.float().flatten(1)), views.lower(where, name))


def random_one_on(views: Views, where: str) -> OfSet:
    """The capsules of the random W with all but the longest of each image set to 0."""
    poses = all_on("random", views, where)

    def longest(name: str) -> Float[Tensor, "N J d"]:
        found = poses(name)
        return mask(found, winner(found))

    return longest


def network(load: Callable, encode: Callable[..., Codes], views: Views, where: str) -> OfSet:
    """The code of a system that ships: ``encode(load(), images)``."""
    return lambda name: in_parts(partial(encode, load()), views.images(where, name))


class Code(NamedTuple):
    """The weight files of a code, and how it is made."""

    weights: tuple[str, ...]
    make: Callable[[Views, str], OfSet]


CODES = {
    "pixels": Code((), pixels),
    "pca": Code((), pca),
    "one-on": Code((MODEL,), partial(one_on, "trained")),
    "all-on": Code((MODEL,), partial(all_on, "trained")),
    "unviewed-one-on": Code((MODEL,), partial(one_on, "unviewed")),
    "unviewed-all-on": Code((MODEL,), partial(all_on, "unviewed")),
    "random": Code((MODEL,), partial(all_on, "random")),
    "random-one-on": Code((MODEL,), random_one_on),
    "vae": Code(("vae-mnist",), partial(network, load_vae, VAE.encode)),
    "rbm": Code(
        ("rbm",),
        partial(network, load_rbm, lambda rbm, images: hidden_probability(rbm, images.flatten(1))),
    ),
    "capsnet": Code(("capsnet-mnist",), partial(network, load_capsnet, CapsNet.encode)),
    "em-routing": Code(("em-routing-mnist",), partial(network, load_em_routing, as_vectors)),
    "sparse-capsules": Code(
        ("sparse-capsules-mnist",), partial(network, load_sparse_capsules, SparseCapsules.encode)
    ),
}
