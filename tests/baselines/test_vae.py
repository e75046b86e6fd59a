"""The VAE: its bound against plain formulas and an integral, its training, and what the shipped one can do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence
from torch.testing import assert_close

from capsnb import checkpoints, data
from capsnb.baselines.vae import VAE, VAESettings, load_vae, train_vae
from capsnb.pretrained import WEIGHTS

SMALL = VAESettings(latent=3, channels=5, epochs=1.0, batch=11)


def small(**changes):
    torch.manual_seed(5)
    vae = VAE(replace(SMALL, **changes))
    with torch.no_grad():
        vae.convolutions.biases[0].normal_()
    return vae


def test_the_bound_is_the_bernoulli_cross_entropy_and_the_divergence_of_the_posterior_from_the_prior(digits, double):
    vae, images, noise = small().double(), digits[0][:7].double(), double(7, 3)
    mean, log_variance = (part.double() for part in vae.posterior(images))
    posterior = Normal(mean, (log_variance / 2).exp())
    p = vae.decode(mean + posterior.scale * noise).double()
    cross_entropy, divergence = vae.bound(images, noise)
    assert_close(cross_entropy.double(), -(images * p.log() + (1 - images) * (1 - p).log()).sum((1, 2, 3)))
    prior = Normal(torch.zeros(7, 3).double(), torch.ones(7, 3).double())
    assert_close(divergence.double(), kl_divergence(Independent(posterior, 1), Independent(prior, 1)))


def test_with_one_latent_number_minus_the_bound_is_less_than_the_integrated_log_likelihood(digits):
    """log p(x) = log of the integral of p(x given z) N(z) dz, here by a fine sum over z."""
    vae, images = small(latent=1), digits[0][:7]
    z = torch.linspace(-6, 6, 2001)[:, None]
    p = vae.decode(z).double().flatten(1)
    x = images.double().flatten(1)
    log_p = x @ p.log().T + (1 - x) @ (1 - p).log().T + Normal(0, 1).log_prob(z).double().T
    exact = log_p.logsumexp(1) + np.log(12 / 2000)
    draws = [sum(vae.bound(images, torch.randn(7, 1))).detach() for _ in range(300)]
    assert (-torch.stack(draws).mean(0) < exact).all()


def test_the_features_between_encoder_and_decoder_are_those_of_stage_1(digits):
    """With an encoder and a decoder that copy three features, decoding the mean is stage 1's own decoding of them."""
    vae, images = small(), digits[0][:7]
    with torch.no_grad():
        for linear in (vae.to_latent, vae.from_latent):
            linear.weight.zero_()
            linear.bias.zero_()
        for number in range(3):
            vae.to_latent.weight[number, 31 * number + 6] = 1.0
            vae.from_latent.weight[31 * number + 6, number] = 1.0
    features = vae.convolutions.encode(images)
    kept = torch.zeros(7, 180)
    kept[:, [6, 37, 68]] = features.flatten(1)[:, [6, 37, 68]]
    kept = torch.nn.functional.leaky_relu(kept, 0.2)
    expected = vae.convolutions.decode_logits(kept.view(7, 5, 6, 6)).sigmoid()
    assert_close(vae.decode(vae.posterior(images)[0]), expected)


def test_samples_are_decoded_draws_of_the_generator(monkeypatch):
    vae = small()
    monkeypatch.setattr("capsnb.baselines.vae._PART", 4)
    found = vae.sample(11, rng=torch.Generator().manual_seed(2))
    latent = torch.randn(11, 3, generator=torch.Generator().manual_seed(2))
    assert_close(found, torch.cat([vae.decode(one[None]) for one in latent]))
    assert found.shape == (11, 1, 28, 28) and found.min() >= 0 and found.max() <= 1


def test_training_raises_the_bound(digits):
    vae = small(epochs=20.0, batch=20)
    losses = [step.loss for step in train_vae(vae, digits[0][:100], seed=0)]
    assert len(losses) == 100 and sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_training_that_was_interrupted_ends_with_the_same_weights(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("capsnb.training._SECONDS_BETWEEN_CHECKPOINTS", -1)

    def train(vae, path, updates):
        for _, _ in zip(range(updates), train_vae(vae, digits[0][:97], seed=1, checkpoint=path)):
            pass
        return vae.state_dict()

    whole = train(small(), tmp_path / "whole", 99)
    train(small(), tmp_path / "parts", 4)
    assert_close(train(small(), tmp_path / "parts", 99), whole, rtol=0, atol=0)


def test_the_shipped_vae_reconstructs_digits_and_its_measures_lie_beside_it():
    images, _ = data.load("mnist", "test", sample=True)
    vae = load_vae()
    with torch.no_grad():
        found = vae.decode(vae.posterior(images[:251])[0])
    assert (found - images[:251]).square().mean() < 0.02
    path = WEIGHTS / "vae-mnist.safetensors"
    assert path.stat().st_size <= 4e6
    metrics = checkpoints.read_json(path.with_suffix(".metrics.json"))
    assert metrics["images"] == 60_000 and metrics["quick"] is False
    assert metrics["test"]["cross_entropy"] + metrics["test"]["divergence"] < 125


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="vae.safetensors does not exist"):
        load_vae(tmp_path / "vae.safetensors")
