"""The experiment on samples draws what its rows say, measures it, resumes, and sees when weights have changed."""

import json

import pytest
import torch
from torch.testing import assert_close

from capsnb import checkpoints, data
from capsnb.baselines.rbm import RBM
from capsnb.baselines.vae import VAE, VAESettings
from capsnb.classifier import load_classifier
from capsnb.sampling import sample_poses
from experiments import results, sample_quality
from experiments.sample_quality import (
    ROWS,
    Real,
    Results,
    fingerprint,
    gibbs_chains,
    main,
    measure,
    network_fitted,
    one_capsule,
    real_images,
    training_poses,
    vae_fitted,
)

NOTHING = torch.zeros(0, 1, 28, 28)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_model_is_sampled_in_every_domain_beside_its_yardsticks():
    assert set(ROWS) >= {"training-images", "pca-16", "pca-320", "rbm", "vae"}
    for model in ("paper", "dense", "sparse"):
        assert {f"{model}-{domain}" for domain in ("complete", "restricted", "fitted")} <= set(ROWS)


def test_training_images_are_drawn_without_repetition(digits):
    found = real_images(211, digits[0], rng=generator())
    rows = {image.numpy().tobytes() for image in digits[0]}
    assert len({image.numpy().tobytes() for image in found} & rows) == 211


def test_one_capsule_is_on_as_often_as_it_wins_and_its_pose_comes_from_the_domain(small_model, monkeypatch):
    monkeypatch.setattr(sample_quality, "load_pretrained", {"name": small_model}.get)
    small_model.poses.share.copy_(torch.tensor([0.5, 0.0, 0.25, 0.2, 0.05]))
    layers = []
    monkeypatch.setattr(type(small_model), "decode", lambda self, capsules: layers.append(capsules))
    one_capsule("name", "restricted", 2003, NOTHING, rng=generator(3))
    poses = sample_poses(2003, small_model.poses, domain="restricted", rng=generator(3))
    on = layers[0].abs().amax(2) > 0
    assert (on.sum(1) == 1).all() and torch.equal(layers[0][on], poses[on])
    assert_close(on.float().mean(0), small_model.poses.share, atol=0.04, rtol=0)


def test_samples_of_a_capsule_network_are_one_capsule_at_a_time_with_poses_like_those_it_has(digits):
    class Network:
        """Two capsules of 3: one for the first half of the images, at (3, 0, 0), the other at (0, -2, 0)."""

        def encode(self, images):
            first = (images.flatten(1).sum(1) > images.flatten(1).sum(1).median()).float()
            codes = torch.zeros(len(images), 2, 3)
            codes[:, 0, 0], codes[:, 1, 1] = 3 * first, -2 * (1 - first)
            return codes + 1e-3 * torch.randn(codes.shape, generator=generator())

        def decode(self, capsules):
            self.layers = capsules
            return torch.zeros(len(capsules), 1, 28, 28)

    network = Network()
    network_fitted(lambda: network, 503, digits[0], rng=generator())
    on = torch.linalg.vector_norm(network.layers, dim=2) > 0
    assert (on.sum(1) == 1).all()
    assert_close(on.float().mean(0), torch.tensor([0.5, 0.5]), atol=0.1, rtol=0)
    for j, pose in enumerate(([3.0, 0.0, 0.0], [0.0, -2.0, 0.0])):
        assert_close(network.layers[on[:, j], j], torch.tensor(pose).expand(int(on[:, j].sum()), 3), atol=0.1, rtol=0)


def test_training_poses_give_reconstructions_of_training_images(small_model, digits, monkeypatch):
    monkeypatch.setattr(sample_quality, "load_pretrained", {"name": small_model}.get)
    expected = small_model.reconstruct(real_images(7, digits[0], rng=generator(4)))
    assert torch.equal(training_poses("name", 7, digits[0], rng=generator(4)), expected)


def test_gibbs_chains_of_a_machine_without_weights_show_its_biases_and_every_chain_gives_its_share(monkeypatch):
    bias = torch.linspace(-3, 3, 784)
    monkeypatch.setattr(sample_quality, "load_rbm", lambda path: RBM(torch.zeros(784, 5), bias, torch.zeros(5)))
    monkeypatch.setattr(sample_quality, "CHAINS", 7)
    monkeypatch.setattr(sample_quality, "BURN_IN", 3)
    found = gibbs_chains(17, NOTHING, rng=generator())
    assert_close(found, bias.sigmoid().view(1, 1, 28, 28).expand(17, -1, -1, -1))


def test_gibbs_chains_reach_the_mode_of_a_machine_that_starts_in_noise_and_come_apart(monkeypatch):
    """One hidden unit turns all pixels on or off together, so every picture is almost white or almost black."""
    machine = RBM(torch.full((784, 1), 8.0), torch.full((784,), -4.0), torch.full((1,), -4.0 * 784))
    monkeypatch.setattr(sample_quality, "load_rbm", lambda path: machine)
    monkeypatch.setattr(sample_quality, "BURN_IN", 20)
    found = gibbs_chains(31, NOTHING, rng=generator()).flatten(1)
    assert ((found > 0.9).all(1) | (found < 0.1).all(1)).all()


def test_the_fitted_vae_draws_latent_numbers_with_the_moments_of_those_of_the_images(digits, monkeypatch):
    torch.manual_seed(5)
    vae, drawn = VAE(VAESettings(latent=3, channels=5)).eval(), []
    monkeypatch.setattr(sample_quality, "load_vae", lambda: vae)
    monkeypatch.setattr(VAE, "decode", lambda self, latent: drawn.append(latent))
    vae_fitted(40_009, digits[0][:300], rng=generator())
    with torch.no_grad():
        mean, log_variance = vae.posterior(digits[0][:300])
    noise = torch.randn(500, *mean.shape, generator=generator(1))
    seen = (mean + (log_variance / 2).exp() * noise).flatten(0, 1)
    assert_close(drawn[0].mean(0), seen.mean(0), atol=0.02, rtol=0)
    assert_close(drawn[0].T.cov(), seen.T.cov(), atol=0.03, rtol=0)


def test_pictures_are_the_first_samples_and_the_training_images_nearest_to_them(digits):
    train, test = digits[0][:503], digits[0][503:803]
    real, samples = Real(train, test, load_classifier()), (train[100:160] * 0.9)
    measures, images = measure(samples, real, rng=generator())
    assert torch.equal(images["/neighbours"], (255 * train[100:110, 0]).round().byte())
    assert torch.equal(images[""], (255 * samples[:40, 0]).round().byte())
    expected = (0.1 * train[100:160]).flatten(1).norm(dim=1).median().item()
    assert measures["nearest_training"] == pytest.approx(expected, rel=1e-2)
    assert (real.features / real.scale).var(0).mean().item() == pytest.approx(1)


def test_the_fingerprint_of_a_row_changes_with_its_weights_a_shared_stage_and_the_classifier(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "WEIGHTS", tmp_path)

    def write(name, value, **facts):
        checkpoints.write(tmp_path / f"{name}.safetensors", {"w": torch.tensor([value])}, **facts)

    for name in ("classifier-mnist", "mnist", "rbm"):
        write(name, 1.0)
    write("mnist-dense", 1.0, autoencoder="mnist.safetensors")
    before = {names: fingerprint(names) for names in ((), ("rbm",), ("mnist",), ("mnist-dense",))}

    def changed():
        return {names for names, value in before.items() if fingerprint(names) != value}

    write("rbm", 2.0)
    assert changed() == {("rbm",)}
    write("mnist", 2.0)
    assert changed() == {("rbm",), ("mnist",), ("mnist-dense",)}
    write("classifier-mnist", 2.0)
    assert changed() == set(before)


# The whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The results file of a quick run of three rows."""
    out = tmp_path_factory.mktemp("results") / "quality.json"
    main(["--quick", "--seed", "3", "--out", str(out), "--only", "training-images", "pca-16", "sparse-fitted"])
    return out


def test_a_quick_run_writes_every_measure_and_says_that_it_was_quick(finished):
    content = json.loads(finished.read_text())
    assert content["quick"] is True and content["seed"] == 3 and "torch" in content["versions"]
    assert content["reference"]["confident"] > 0.9
    for record in content["rows"].values():
        assert record["samples"] == sample_quality.QUICK_SAMPLES and record["real"] == 1000
        assert len(record["class_share"]) == 10 and record["nearest_training"] >= 0
    rows = content["rows"]
    assert rows["training-images"]["fid"] < rows["pca-16"]["fid"] and rows["training-images"]["nearest_training"] == 0


def test_the_pictures_of_a_quick_run_are_uncurated_samples_and_their_neighbours(finished):
    found = checkpoints.read(finished.with_suffix(".safetensors"))[0]
    names = ("training-images", "pca-16", "sparse-fitted")
    assert sorted(found) == sorted(["test", *names, *(f"{name}/neighbours" for name in names)])
    images, _ = data.load("mnist", "train", sample=True)
    expected = real_images(200, images, rng=generator(3))[:40, 0]
    assert_close(found["training-images"] / 255, expected)
    assert torch.equal(found["training-images/neighbours"], found["training-images"][:10])


def test_a_second_run_keeps_what_is_finished_and_draws_what_is_missing_or_made_with_other_weights(out, monkeypatch):
    content, drawn = json.loads(out.read_text()), []
    content["rows"]["sparse-fitted"]["fingerprint"] = "of other weights"
    checkpoints.write_json(out, content)
    measured = sample_quality.measure
    monkeypatch.setattr(sample_quality, "measure", lambda *a, **k: drawn.append(1) or measured(*a, **k))
    main(["--quick", "--seed", "3", "--out", str(out), "--only", "pca-16", "pca-320", "sparse-fitted"])
    after = json.loads(out.read_text())["rows"]
    assert len(drawn) == 2 and after["pca-16"] == content["rows"]["pca-16"]
    assert after["sparse-fitted"]["fingerprint"] == fingerprint(("mnist",)) and "pca-320" in after


def test_a_row_without_its_pictures_is_not_finished(out):
    assert Results(out, True, 3).holds("pca-16") and not Results(out, True, 3).holds("rbm")
    out.with_suffix(".safetensors").unlink()
    assert not Results(out, True, 3).holds("pca-16")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "pca-17"], "invalid choice: 'pca-17' (choose from"),
        (["--quick", "--seed", "4"], "was made with seed 3, not 4; choose another --out"),
        (["--seed", "3"], "was made with quick True, not False; choose another --out"),
    ],
)
def test_unknown_rows_and_results_of_another_run_are_refused(arguments, message, out, capsys):
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(out)])
    assert message in capsys.readouterr().err
