"""What is measured of the systems beside expert capsules, on test images.

Those of expert capsules are in capsnb.evaluation.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from capsnb.baselines.capsnet import CapsNet
from capsnb.baselines.capsule_network import squared_error
from capsnb.baselines.matrix_capsules import EMRouting
from capsnb.baselines.rbm import RBM, binarise, free_energy, hidden_probability, new_rbm, visible_probability
from capsnb.baselines.sparse_capsules import SparseCapsules
from capsnb.baselines.vae import VAE, divergence
from capsnb.classifier import Classifier
from capsnb.evaluation import linear_probe, ranks, winner, winner_measures
from capsnb.likelihood import anneal_rbm, independent_pixels, ladder, log_mean
from capsnb.quality import CONFIDENT

Labelled = tuple[Tensor, Tensor]  # images, and their labels
USED = 0.01  # nats of divergence from N(0, 1), a mean over images, above which a latent number counts as used
CHAINS, TEMPERATURES = 400, 2_500  # of annealed importance sampling; with a fifth of the temperatures log Z is too low
CLOSER = 2.0  # an RBM changes most near the end of the way: the power of its ladder


def measure_classifier(classifier: Classifier, images: Tensor, labels: Tensor) -> dict:
    """The share of images that are classified rightly, and of those that are so with a probability above 0.9."""
    probability, found = classifier.probabilities(images).max(1)
    right = found == labels
    confident = (probability > CONFIDENT).float().mean().item()
    return {"images": len(images), "accuracy": right.float().mean().item(), "confident": confident}


@torch.no_grad()
def measure_vae(vae: VAE, images: Tensor, *, rng: torch.Generator) -> dict:
    """The two parts of minus the ELBO in nats per image, one draw for each image, and how many numbers are used."""
    sums = torch.zeros(2)
    posteriors = [vae.posterior(part) for part in images.split(250)]
    for part in images.split(250):
        noise = torch.randn(len(part), vae.settings.latent, generator=rng)
        sums += torch.stack([term.sum() for term in vae.bound(part, noise)])
    mean, log_variance = (torch.cat(parts) for parts in zip(*posteriors))
    cross_entropy, total = (sums / len(images)).tolist()
    used = int((divergence(mean, log_variance).mean(0) > USED).sum())
    return {"images": len(images), "cross_entropy": cross_entropy, "divergence": total, "latent_numbers_used": used}


def measure_capsnet(capsnet: CapsNet, images: Tensor, labels: Tensor) -> dict:
    """The share of images whose longest capsule is the wrong one, and the squared error of what that one makes."""
    capsules = capsnet.encode(images)
    squares = squared_error(capsnet.reconstruct(capsules), images).mean().item()
    return _mistakes(winner(capsules), labels) | {"squared_error": squares}


def measure_em_routing(network: EMRouting, images: Tensor, labels: Tensor) -> dict:
    """The share of images whose most active capsule is the wrong one."""
    return _mistakes(network.encode(images)[1].argmax(1), labels)


def _mistakes(found: Int[Tensor, "B"], labels: Int[Tensor, "B"]) -> dict:
    wrong = int((found != labels).sum())
    return {"images": len(labels), "wrong": wrong, "error": wrong / len(labels)}


def measure_sparse_capsules(network: SparseCapsules, train: Labelled, test: Labelled) -> dict:
    """What the masked capsules v' tell of the images, who wins and comes first, and a probe of v without the mask.

    "support" and "boosted" hold what Rawlinson 2018 plot in their figures 3 and 4, of the support and times its boost.
    """
    (known, known_labels), (images, labels) = train, test
    taught, latent = network.latent(known), network.latent(images)
    capsules = network.masked(latent)
    squares = torch.cat([squared_error(network.decode(c), x) for c, x in zip(capsules.split(250), images.split(250))])
    return {
        "images": len(images),
        "squared_error": squares.mean().item(),
        **winner_measures(capsules, labels),
        "linear_probe": linear_probe(network.masked(taught), known_labels, capsules, labels),
        "linear_probe_unmasked": linear_probe(taught.capsules, known_labels, latent.capsules, labels),
        "boost": network.lifetime.boost.tolist(),
        "support": ranks(latent.support),
        "boosted": ranks(network.lifetime.score(latent.support)),
    }


def measure_rbm(
    rbm: RBM, known: Float[Tensor, "N 1 28 28"], images: Float[Tensor, "B 1 28 28"], *, rng: torch.Generator
) -> dict:
    """The mean log probability of the images, made binary, in nats, with the log Z of annealed importance sampling.

    The chains start at pixels that are 1 as often as those of the ``known`` images, and independent; few effective
    ones mean that log Z is rather larger. With it the squared error of the images that the hidden units'
    probabilities give back. Takes a minute.
    """
    base, v = new_rbm(binarise(known, rng=rng), len(rbm.c), rng=rng, deviation=0.0), binarise(images, rng=rng)
    start, log_z_base = independent_pixels(base, CHAINS, rng=rng)
    found = log_mean(anneal_rbm(rbm, base, start, ladder(TEMPERATURES, power=CLOSER), rng=rng).log_weight)
    log_z = found.value + log_z_base.item()
    squares = (v - visible_probability(rbm, hidden_probability(rbm, v))).square().sum(1).mean().item()
    return {
        "images": len(images),
        "log_likelihood": -free_energy(rbm, v).mean().item() - log_z,
        "log_z": log_z,
        "log_z_error": found.error,
        "log_z_effective": found.effective,
        "squared_error": squares,
    }
