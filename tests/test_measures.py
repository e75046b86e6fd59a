"""What is measured of the systems beside expert capsules, each against its definition."""

from dataclasses import replace

import pytest
import torch

from capsnb import measures
from capsnb.baselines.capsnet import CapsNet, CapsNetSettings
from capsnb.baselines.matrix_capsules import EMRouting
from capsnb.baselines.rbm import log_likelihood, new_rbm
from capsnb.baselines.sparse_capsules import SparseCapsules, SparseCapsulesSettings
from capsnb.baselines.vae import VAE, VAESettings
from capsnb.classifier import Classifier
from capsnb.evaluation import linear_probe, ranks, winner_measures
from capsnb.measures import (
    measure_capsnet,
    measure_classifier,
    measure_em_routing,
    measure_rbm,
    measure_sparse_capsules,
    measure_vae,
)

CAPSULES = SparseCapsulesSettings(
    channels=3, types=2, primary_dim=3, dim=5, first_hidden=7, second_hidden=11, capsules=7, batch=50
)


def told(network, **answers):
    """``network``, whose methods of these names give these answers to everything."""
    for name, answer in answers.items():
        setattr(network, name, lambda *inputs, answer=answer: answer)
    return network


def test_the_classifier_is_measured_by_the_share_it_gets_right_and_the_share_it_is_sure_of():
    answer = torch.tensor([[0.95, 0.05], [0.4, 0.6], [0.92, 0.08], [0.5, 0.5]])
    found = measure_classifier(told(Classifier(), probabilities=answer), torch.zeros(4), torch.tensor([0, 1, 1, 0]))
    assert found == {"images": 4, "accuracy": 0.75, "confident": 0.5}


def test_the_vae_is_measured_by_both_parts_of_its_bound_and_by_the_numbers_it_uses(digits):
    torch.manual_seed(5)
    vae, images = VAE(VAESettings(latent=3, channels=5)).eval(), digits[0][:307]
    with torch.no_grad():
        vae.to_latent.weight[[1, 4]] = 0  # the second number's mean and log variance
        vae.to_latent.bias[[1, 4]] = 0
        mean, log_variance = vae.posterior(images)
        many = [torch.stack(vae.bound(images, torch.randn(307, 3))).mean(1) for _ in range(30)]
    found = measure_vae(vae, images, rng=torch.Generator().manual_seed(0))
    assert found["cross_entropy"] == pytest.approx(torch.stack(many)[:, 0].mean().item(), rel=0.01)
    assert found["divergence"] == pytest.approx(many[0][1].item(), rel=1e-5)
    assert found["latent_numbers_used"] == 2 and found["images"] == 307


def test_capsnet_is_measured_by_the_images_it_gets_wrong_and_by_the_squared_error_of_what_it_makes(rng):
    capsules = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4], [0.5, 0.2], [0.0, 0.7]]).unsqueeze(2)
    images, sizes = torch.rand(5, 1, 3, 7, generator=rng), {"channels": 3, "types": 2, "primary_dim": 3}
    capsnet = told(CapsNet(CapsNetSettings(**sizes)), encode=capsules, reconstruct=torch.full((5, 1, 3, 7), 0.5))
    found = measure_capsnet(capsnet, images, torch.tensor([1, 0, 0, 0, 0]))
    assert (found["images"], found["wrong"], found["error"]) == (5, 2, 0.4)
    assert found["squared_error"] == pytest.approx(sum((x - 0.5) ** 2 for x in images.flatten().tolist()) / 5, rel=1e-5)


def test_sparse_capsules_are_masked_when_they_are_measured_and_probed_with_the_mask_and_without(digits):
    torch.manual_seed(5)
    network = SparseCapsules(replace(CAPSULES, initial_deviation=2.0)).eval()
    network.lifetime.boost[3] = 1.5
    (images, labels), many = (part[:307] for part in digits), tuple(part[307:] for part in digits)
    found = measure_sparse_capsules(network, many, (images, labels))
    capsules, latent, taught = network.encode(images), network.latent(images), network.latent(many[0])
    errors = [(a - b).square().sum().item() for a, b in zip(network.decode(capsules), images)]
    assert found["squared_error"] == pytest.approx(sum(errors) / 307, rel=1e-5) and found["images"] == 307
    assert found.items() >= winner_measures(capsules, labels).items()
    masked = linear_probe(network.encode(many[0]), many[1], capsules, labels)
    plain = linear_probe(taught.capsules, many[1], latent.capsules, labels)
    assert (found["linear_probe"], found["linear_probe_unmasked"]) == pytest.approx((masked, plain)) and masked != plain
    assert found["boost"] == [1, 1, 1, 1.5, 1, 1, 1]
    assert found["support"] == ranks(latent.support)
    assert found["boosted"] == ranks(latent.support * network.lifetime.boost) != found["support"]


def test_em_routing_is_measured_by_the_images_whose_most_active_capsule_is_the_wrong_one():
    answer = torch.zeros(3, 2, 16), torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4]])
    found = measure_em_routing(told(EMRouting(), encode=answer), torch.zeros(3, 1, 28, 28), torch.tensor([1, 1, 1]))
    assert found == {"images": 3, "wrong": 1, "error": 1 / 3}


def test_an_rbm_is_measured_by_a_log_likelihood_within_the_error_of_the_exact_one(digits, rng, monkeypatch):
    """Few hidden units, so that log Z is known; the images are binary already."""
    monkeypatch.setattr(measures, "TEMPERATURES", 100)
    known, images = (part.gt(0.5).float() for part in (digits[0][:101], digits[0][101:204]))
    rbm = new_rbm(known.flatten(1), 5, rng=rng, deviation=0.1)._replace(c=torch.linspace(-1, 1, 5))
    found, exact = measure_rbm(rbm, known, images, rng=rng), log_likelihood(rbm, images.flatten(1)).mean().item()
    assert found["log_z_error"] < 0.2 and found["log_likelihood"] == pytest.approx(exact, abs=5 * found["log_z_error"])
    back = [torch.sigmoid(rbm.w @ torch.sigmoid(rbm.w.T @ v + rbm.c) + rbm.b) for v in images.flatten(1)]
    squares = [(v - p).square().sum().item() for v, p in zip(images.flatten(1), back)]
    assert found["squared_error"] == pytest.approx(sum(squares) / 103, rel=1e-4) and found["images"] == 103
