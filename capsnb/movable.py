"""Every system that can be moved by hand: which there are, and what the explorer needs of those beside expert capsules.

The explorer moves the numbers between an encoder and a decoder, whatever lies there: the poses of capsules, or the
latent numbers of a VAE, which it takes as one capsule that may have any length.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from capsnb import data
from capsnb.baselines.capsnet import load_capsnet
from capsnb.baselines.capsule_network import CapsuleNetwork
from capsnb.baselines.sparse_capsules import load_sparse_capsules
from capsnb.baselines.vae import VAE, load_vae
from capsnb.model import ExpertCapsules
from capsnb.pretrained import load_pretrained
from capsnb.runs import EXPERT_CAPSULES
from capsnb.sampling import Poses

_IMAGES = 500  # training images whose codes are the poses that are known


class LatentPoses(Poses):
    """What is known of a VAE's latent numbers: they are spread like standard Gaussians and may have any length."""

    bounded = False
    reach = 2.5  # about as far as their training range, as 0.25 is in capsules


class Movable(NamedTuple):
    """What the explorer needs of a system, as ``ExpertCapsules`` has it, and its decoder for the browser.

    ``layers`` are what ``decode`` does one after the other, each of a kind that ``capsnb.web_layers`` knows.
    """

    poses: Poses
    encode: Callable[[Float[Tensor, "B 1 28 28"]], Float[Tensor, "B J d"]]
    decode: Callable[[Float[Tensor, "B J d"]], Float[Tensor, "B 1 28 28"]]
    layers: tuple[nn.Module, ...]


Model = ExpertCapsules | Movable


def movable_network(network: CapsuleNetwork, dataset: str) -> Movable:
    """CapsNet, or sparse capsules: the upper capsules, of which one alone is decoded."""
    poses = Poses(network.W.shape[1], network.W.shape[2])
    return _known(Movable(poses, network.encode, network.decode, tuple(network.decoder)), dataset)


def movable_vae(vae: VAE, dataset: str) -> Movable:
    """A VAE: the means of its posteriors as one capsule."""

    def encode(images: Float[Tensor, "B 1 28 28"]) -> Float[Tensor, "B 1 d"]:
        return vae.encode(images).unsqueeze(1)

    def decode(capsules: Float[Tensor, "B 1 d"]) -> Float[Tensor, "B 1 28 28"]:
        return vae.decode(capsules.squeeze(1))

    layers = (vae.from_latent, nn.LeakyReLU(vae.convolutions.settings.slope), vae.convolutions)
    return _known(Movable(LatentPoses(1, vae.settings.latent), encode, decode, layers), dataset)


def _known(system: Movable, dataset: str) -> Movable:
    """The system, with the poses of the shipped training images."""
    system.poses.fit(system.encode(data.load(dataset, "train", sample=True)[0][:_IMAGES]))
    return system


class Choice(NamedTuple):
    """A system to choose: its name for readers, the trained model for each of its data sets, words for its capsules.

    ``length`` says what the length of a capsule means, ``wins`` in which sense it is that of the class it wins most.
    """

    title: str
    load: Callable[[str], Model]
    datasets: tuple[str, ...] = ("mnist",)
    length: str = ""
    wins: str = "mostly"


CHOICES = {
    EXPERT_CAPSULES: Choice(
        "Expert capsules", load_pretrained, ("mnist", "fashion-mnist"), length="how probable it is that it fires"
    ),
    "capsnet": Choice(
        "CapsNet",
        lambda dataset: movable_network(load_capsnet(), dataset),
        length="how sure it is that its digit is there",
        wins="class",
    ),
    "sparse-capsules": Choice(
        "Sparse capsules",
        lambda dataset: movable_network(load_sparse_capsules(), dataset),
    ),
    "vae": Choice("VAE", lambda dataset: movable_vae(load_vae(), dataset)),
}


def model_name(system: str, dataset: str) -> str:
    """The name of a system's model: that of its file for the browser."""
    return dataset if system == EXPERT_CAPSULES else f"{system}-{dataset}"


def models() -> list[tuple[str, str, str]]:
    """Every model that can be moved: its name, its system and its data set."""
    pairs = [(system, dataset) for system, row in CHOICES.items() for dataset in row.datasets]
    return [(model_name(*pair), *pair) for pair in pairs]
