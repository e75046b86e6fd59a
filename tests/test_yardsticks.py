"""The command that trains the classifier and the other systems: what it writes, measures, and goes on with."""

from dataclasses import replace

import pytest
import torch

from capsnb import checkpoints
from capsnb.baselines.capsnet import CapsNet, CapsNetSettings
from capsnb.baselines.sparse_capsules import SparseCapsules, SparseCapsulesSettings
from capsnb.baselines.vae import VAE, VAESettings
from capsnb.classifier import Classifier, ClassifierSettings
from capsnb.evaluation import linear_probe, winner_measures
from experiments import yardsticks
from experiments.ranking import ranks
from experiments.yardsticks import (
    YARDSTICKS,
    main,
    measure_capsnet,
    measure_classifier,
    measure_sparse_capsules,
    measure_vae,
)

CAPSULES = SparseCapsulesSettings(
    channels=3, types=2, primary_dim=3, dim=5, first_hidden=7, second_hidden=11, capsules=7, batch=50
)
SMALL = {
    "classifier": ClassifierSettings(first_channels=3, channels=5, features=7, batch=50),
    "vae": VAESettings(latent=3, channels=5, batch=50),
    "capsnet": CapsNetSettings(channels=3, types=2, primary_dim=3, dim=5, first_hidden=7, second_hidden=11, batch=50),
    "sparse-capsules": CAPSULES,
    "dense-capsules": replace(CAPSULES, gamma=0.0),
}


@pytest.fixture
def small(monkeypatch):
    chosen = {name: row._replace(settings=SMALL[name]) for name, row in YARDSTICKS.items()}
    monkeypatch.setattr(yardsticks, "YARDSTICKS", chosen)
    monkeypatch.setattr(yardsticks, "CURVE_EVERY", 3)


KINDS = {"classifier": Classifier, "vae": VAE, "capsnet": CapsNet}
KINDS |= {"sparse-capsules": SparseCapsules, "dense-capsules": SparseCapsules}


@pytest.mark.parametrize("name, kind", KINDS.items())
def test_a_quick_run_writes_weights_in_16_bits_and_their_measures_beside_them(name, kind, small, tmp_path):
    out = tmp_path / f"{name}.safetensors"
    main([name, "--quick", "--seed", "3", "--out", str(out)])
    tensors, facts = checkpoints.read(out)
    metrics = checkpoints.read_json(tmp_path / f"{name}.metrics.json")
    assert {value.dtype for value in tensors.values()} <= {torch.float16, torch.int64}
    assert facts["quick"] is True and facts["seed"] == 3 and facts["images"] == 1000
    assert metrics["steps"] == [3, 6, 9, 10] and len(metrics["loss"]) == 4 and metrics["test"]["images"] == 1000
    network = kind(replace(SMALL[name], **facts["settings"]))
    network.load_state_dict({key: value.to(network.state_dict()[key]) for key, value in tensors.items()})
    assert not (tmp_path / f"{name}.checkpoint.safetensors").exists()


def test_an_interrupted_run_goes_on_and_its_curve_too(small, tmp_path, monkeypatch):
    monkeypatch.setattr("capsnb.training._SECONDS_BETWEEN_CHECKPOINTS", -1)
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    main(["vae", "--quick", "--out", str(whole)])

    follow = yardsticks.follow

    def stopping(updates, *rest):
        def first_five():
            for step in updates:
                yield step
                if step.step == 5:
                    raise KeyboardInterrupt

        return follow(first_five(), *rest)

    monkeypatch.setattr(yardsticks, "follow", stopping)
    with pytest.raises(KeyboardInterrupt):
        main(["vae", "--quick", "--out", str(parts)])
    monkeypatch.setattr(yardsticks, "follow", follow)
    main(["vae", "--quick", "--out", str(parts)])
    expected, found = (checkpoints.read(path)[0] for path in (whole, parts))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    curves = [checkpoints.read_json(path.with_suffix(".metrics.json")) for path in (whole, parts)]
    assert curves[0]["loss"] == curves[1]["loss"] and curves[0]["steps"] == curves[1]["steps"] == [3, 6, 9, 10]


def test_the_classifier_is_measured_by_the_share_it_gets_right_and_the_share_it_is_sure_of(monkeypatch):
    class Told:
        def probabilities(self, images):
            return torch.tensor([[0.95, 0.05], [0.4, 0.6], [0.92, 0.08], [0.5, 0.5]])

    found = measure_classifier(Told(), torch.zeros(4), torch.tensor([0, 1, 1, 0]))
    assert found == {"images": 4, "accuracy": 0.75, "confident": 0.5}


def test_the_vae_is_measured_by_both_parts_of_its_bound_and_by_the_numbers_it_uses(digits):
    torch.manual_seed(5)
    vae, images = VAE(SMALL["vae"]).eval(), digits[0][:307]
    with torch.no_grad():
        vae.to_latent.weight[[1, 4]] = 0  # the second number's mean and log variance
        vae.to_latent.bias[[1, 4]] = 0
        mean, log_variance = vae.posterior(images)
        many = [torch.stack(vae.bound(images, torch.randn(307, 3))).mean(1) for _ in range(30)]
    found = measure_vae(vae, images, digits[1][:307])
    assert found["cross_entropy"] == pytest.approx(torch.stack(many)[:, 0].mean().item(), rel=0.01)
    assert found["divergence"] == pytest.approx(many[0][1].item(), rel=1e-5)
    assert found["latent_numbers_used"] == 2 and found["images"] == 307


def test_capsnet_is_measured_by_the_images_it_gets_wrong_and_by_the_squared_error_of_what_it_makes(rng):
    class Told:
        def encode(self, images):
            return torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4], [0.5, 0.2], [0.0, 0.7]]).unsqueeze(2)

        def reconstruct(self, capsules):
            return torch.full((5, 1, 3, 7), 0.5)

    images = torch.rand(5, 1, 3, 7, generator=rng)
    found = measure_capsnet(Told(), images, torch.tensor([1, 0, 0, 0, 0]))
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


def test_the_dense_capsules_are_the_sparse_ones_without_their_mask():
    sparse, dense = (YARDSTICKS[name].settings for name in ("sparse-capsules", "dense-capsules"))
    assert dense == replace(sparse, gamma=0.0) != sparse
