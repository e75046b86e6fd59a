"""Sparse unsupervised capsules: Rawlinson 2018's equations as loops, training, and numbers at their limits."""

from dataclasses import replace

import numpy as np
import paper
import pytest
import torch
from torch.testing import assert_close

from capsnb import checkpoints, data
from capsnb.baselines.capsule_network import squared_error
from capsnb.baselines.sparse_capsules import (
    DENSE_FRAMES,
    FRAMES,
    SHIPPED,
    Latent,
    Lifetime,
    SparseCapsules,
    SparseCapsulesSettings,
    load_sparse_capsules,
    train_sparse_capsules,
)
from capsnb.sampling import one_at_a_time

J, D = 7, 5
SMALL = SparseCapsulesSettings(
    channels=3, types=2, primary_dim=3, dim=D, first_hidden=11, second_hidden=13, shift=0, epochs=1.0, batch=11
)
SMALL = replace(SMALL, capsules=J, gamma=5.0, cut=0.05, boost_every=3, boost_step=0.25)
BOOSTS = torch.tensor([1.0, 3.0, 1.25, 1.0, 2.0, 1.5, 1.0])


def small(**changes):
    torch.manual_seed(5)
    return SparseCapsules(replace(SMALL, **changes))


def boosted(**changes):
    """A network in which the couplings differ, and the boosts enough to change who comes first."""
    network = small(initial_deviation=3.0, **changes)
    network.lifetime.boost.copy_(BOOSTS)
    return network.eval()


def test_the_network_has_the_sizes_of_the_paper():
    network = SparseCapsules()
    assert network.W.shape == (32 * 6 * 6, 16, 16, 8)
    assert sum(tensor.numel() for tensor in network.parameters()) == 9_149_456


@pytest.mark.parametrize("settings", [FRAMES, DENSE_FRAMES])
def test_the_networks_for_affine_mnist_have_as_many_primary_capsules(settings):
    network = SparseCapsules(settings)
    assert network.W.shape == (32 * 6 * 6, 16, 16, 8) and network.positions == 36
    assert settings.size - 28 == 2 * settings.shift  # a digit moved by the most touches the border


def test_latent_capsules_and_their_support_are_routed_and_summed_as_in_loops(digits):
    network, images = boosted(), digits[0][:3]
    found = network.latent(images)
    for image, x in enumerate(network.lower_capsules(images).detach().numpy()):
        coupling, z = paper.routing(x, network.W.detach().numpy(), 3, "upper", "inner")
        for j in range(J):
            assert np.allclose(found.capsules[image, j], paper.squash(z[j]), rtol=1e-4, atol=1e-6)
            total = sum(max(coupling[2 * place + kind, j] for kind in range(2)) for place in range(36))
            assert found.support[image, j].item() == pytest.approx(total, rel=1e-4)


def test_masked_capsules_are_equations_1_to_4_written_as_loops(rng, double):
    network, v = boosted(), double(11, J, D)
    psi = 1 + torch.rand(11, J, generator=rng, dtype=torch.float64)
    found = network.masked(Latent(v, psi))
    moved = 0
    for k in range(11):
        z = [psi[k, j].item() * BOOSTS[j].item() for j in range(J)]
        moved += int(np.argmax(z) != psi[k].argmax())
        for j in range(J):
            r = sum(other > z[j] for other in z)
            m = np.exp(-5.0 * r / (J - 1))
            assert_close(found[k, j], v[k, j] * (m if m >= 0.05 else 0.0))
    assert moved > 0


def test_the_papers_mask_has_one_capsule_fully_on_and_cuts_all_but_six():
    settings = SparseCapsulesSettings()
    mask = paper.rank_mask(np.arange(16.0), settings.gamma, settings.cut)
    assert (mask > 0).sum() == 6 and mask.max() == 1


def test_an_image_is_encoded_by_its_masked_capsules(digits):
    network, images = boosted(), digits[0][:17]
    capsules, support = network.latent(images)
    expected = capsules * torch.stack([
        torch.as_tensor(paper.rank_mask((row * BOOSTS).numpy(), 5.0, 0.05)).float() for row in support
    ]).unsqueeze(2)
    assert_close(network.encode(images), expected)
    assert (expected == 0).any() and not torch.allclose(expected, capsules)


def test_without_a_mask_every_capsule_says_what_it_has_to_say(digits):
    network = boosted(gamma=0.0)
    assert_close(network.encode(digits[0][:5]), network.latent(digits[0][:5]).capsules)


def test_images_in_parts_have_the_latent_capsules_of_images_together(digits, monkeypatch):
    network = boosted()
    together = network.latent(digits[0][:17])
    monkeypatch.setattr("capsnb.baselines.sparse_capsules.PART", 5)
    assert_close(network.latent(digits[0][:17]), together)


def test_the_training_loss_is_the_squared_error_of_what_the_masked_capsules_reconstruct(digits):
    network, images, total = boosted(), digits[0][:13], 0.0
    for image, capsules in zip(images, network.encode(images)):
        pixels = network.decode(capsules[None])[0]
        total += sum((a - b) ** 2 for a, b in zip(pixels.flatten().tolist(), image.flatten().tolist()))
    assert network(images).item() == pytest.approx(total / 13, rel=1e-5)


def test_images_are_moved_before_they_are_encoded_and_reconstructed(digits):
    still, moving, image = boosted(), boosted(shift=1), digits[0][:1]
    shifts = [(down, right) for down in range(-1, 2) for right in range(-1, 2)]
    allowed = {round(still(image.roll(shift, (2, 3))).item(), 3) for shift in shifts}
    found = set()
    for seed in range(40):
        torch.manual_seed(seed)
        found.add(round(moving(image).item(), 3))
    assert found == allowed and len(allowed) > 1


# Boosts


def plain_lifetimes(batches, settings):
    """Frequencies and boosts after every batch of supports: eqs. 1, 2, 5 (over K alone), 7 and algorithm 1."""
    mu, g, n = [1 / J] * J, [1.0] * J, 0
    for psi in batches.tolist():
        epsilon = [0.0] * J
        for row in psi:
            z = [support * boost for support, boost in zip(row, g)]
            for j in range(J):
                rank = sum(other > z[j] for other in z)
                epsilon[j] += (1 if rank == 0 else 0) / len(psi)
        mu = [settings.running * mu[j] + (1 - settings.running) * epsilon[j] for j in range(J)]
        n += 1
        if n % settings.boost_every == 0:
            for j in range(J):
                if mu[j] < settings.lowest:
                    g[j] = g[j] + settings.boost_step
                if mu[j] > settings.highest:
                    g[j] = max(1, g[j] - settings.boost_step)
        yield mu, list(g)


def test_frequencies_and_boosts_are_equations_5_to_7_and_algorithm_1_written_as_loops(rng):
    settings = replace(SMALL, running=0.7, lowest=0.1, highest=0.2)
    batches = torch.rand(101, 23, J, generator=rng, dtype=torch.float64) + torch.linspace(0, 1, J)
    lifetime, boosts = Lifetime(settings).double(), []
    for batch, (frequency, boost) in zip(batches, plain_lifetimes(batches, settings)):
        lifetime.update(lifetime.score(batch))
        assert_close(lifetime.frequency, torch.tensor(frequency, dtype=torch.float64))
        assert_close(lifetime.boost, torch.tensor(boost, dtype=torch.float64))
        boosts.append(boost)
    changes = np.diff(np.array(boosts), axis=0)
    assert changes.min() < 0 < changes.max() and np.min(boosts) == 1


def test_a_capsule_that_others_always_outdid_comes_first_after_some_boosts(rng):
    support = 1 + torch.rand(101, J, generator=rng)
    support[:, 3] *= 0.4
    lifetime, seen = Lifetime(replace(SMALL, running=0.9)), []
    for _ in range(100):
        lifetime.update(lifetime.score(support))
        seen.append(lifetime.frequency[3].item())
    assert min(seen) < SMALL.lowest / 2 < max(seen[-20:])


def test_only_training_counts_who_comes_first(digits):
    network = boosted()
    before = network.lifetime.frequency.clone()
    network.encode(digits[0][:11]), network(digits[0][:11])
    assert torch.equal(network.lifetime.frequency, before) and network.lifetime.updates == 0
    network.train()(digits[0][:11])
    first = (network.latent(digits[0][:11]).support * BOOSTS).argmax(1)
    expected = 0.99 * before + 0.01 * torch.bincount(first, minlength=J) / 11
    assert_close(network.lifetime.frequency, expected)


def test_with_one_of_several_equally_supported_capsules_first_the_frequencies_still_sum_to_1():
    lifetime = Lifetime(SMALL)
    lifetime.update(torch.ones(11, J))
    assert lifetime.frequency.sum().item() == pytest.approx(1)


# Numbers at their limits


def gradients_are_finite(network):
    return all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in network.parameters())


@pytest.mark.parametrize("capsules", [1, J])
@pytest.mark.parametrize("deviation", [0.0, 1e-30, 1e15])
def test_zero_and_huge_votes_and_a_single_capsule_have_a_finite_loss_and_gradients(digits, deviation, capsules):
    """Huge votes make huge logits: from round 2 on a lower capsule gives everything to one upper capsule."""
    network, images = small(initial_deviation=deviation, capsules=capsules), digits[0][:5]
    loss = network(images)
    loss.backward()
    latent = network.latent(images)
    assert loss.isfinite() and gradients_are_finite(network)
    assert latent.capsules.isfinite().all() and torch.linalg.vector_norm(latent.capsules, dim=2).max() <= 1 + 1e-6
    assert (latent.support >= 0).all() and (latent.support.amax(1) <= 36 + 1e-4).all()


def test_a_single_capsule_is_never_masked(digits):
    network = small(capsules=1)
    assert_close(network.encode(digits[0][:5]), network.latent(digits[0][:5]).capsules)


def test_an_image_without_any_primary_capsule_has_zero_capsules_and_finite_gradients():
    network = small()
    with torch.no_grad():
        for layer in (0, 2):
            network.convolutions[layer].bias.zero_()
    loss = network(torch.zeros(3, 1, 28, 28))
    loss.backward()
    assert loss.isfinite() and gradients_are_finite(network)
    capsules, support = network.latent(torch.zeros(1, 1, 28, 28))
    assert (capsules == 0).all()
    assert_close(support, torch.full((1, J), 36 / J))


def test_a_mask_that_leaves_nobody_on_gives_the_decoder_zeros_and_the_loss_a_gradient(digits):
    network, images = small(cut=2.0), digits[0][:5]
    loss = network(images)
    loss.backward()
    assert (network.encode(images) == 0).all()
    assert loss.isfinite() and gradients_are_finite(network)
    assert loss.item() == pytest.approx((network.decode(torch.zeros(1, J, D)) - images).square().sum().item() / 5)


# Training and files


def test_training_lowers_the_loss_and_ends_in_evaluation_mode(digits):
    network = small(channels=7, initial_deviation=1.0, epochs=10.0, batch=20, learning_rate=2e-2)
    losses = [step.loss for step in train_sparse_capsules(network, digits[0][:100], seed=0)]
    assert len(losses) == 50 and sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert not network.training and network.lifetime.updates == 50


def test_training_that_was_interrupted_ends_with_the_same_weights_and_boosts(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("capsnb.training._SECONDS_BETWEEN_CHECKPOINTS", -1)

    def train(path, updates):
        network = small(shift=2, running=0.5, initial_deviation=1.0)
        for _, _ in zip(range(updates), train_sparse_capsules(network, digits[0][:97], seed=1, checkpoint=path)):
            pass
        return network.state_dict()

    whole = train(tmp_path / "whole", 99)
    train(tmp_path / "parts", 4)
    assert_close(train(tmp_path / "parts", 99), whole, rtol=0, atol=0)
    assert (whole["lifetime.boost"] > 1).any()


def test_a_network_in_16_bits_is_loaded_as_it_was_written(digits, tmp_path):
    network, path = boosted(), tmp_path / "network.safetensors"
    network.lifetime.updates.fill_(30_001)
    state = network.state_dict()
    halves = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    network.load_state_dict(halves)
    checkpoints.write(path, halves, settings=vars(network.settings))
    loaded = load_sparse_capsules(path)
    assert loaded.settings == network.settings and loaded.lifetime.updates == 30_001 and not loaded.training
    assert_close(loaded.encode(digits[0][:3]), network.encode(digits[0][:3]), rtol=0, atol=0)


def test_images_of_another_range_or_size_are_refused(digits):
    with pytest.raises(ValueError, match="divide 8-bit images by 255"):
        small().latent(digits[0] * 255)
    with pytest.raises(ValueError, match="40, 40"):
        small(size=40).encode(digits[0])
    with pytest.raises(ValueError, match="40, 40"):
        next(train_sparse_capsules(small(size=40), digits[0], seed=0))


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="sparse.safetensors does not exist"):
        load_sparse_capsules(tmp_path / "sparse.safetensors")


def test_the_shipped_network_reconstructs_digits_and_each_of_its_capsules_draws_them_alone():
    images, _ = data.load("mnist", "test", sample=True)
    images, network = images[:100], load_sparse_capsules()
    alone = one_at_a_time(network.latent(images).capsules)

    def error(capsules):
        return squared_error(network.decode(capsules), images).mean()

    blank = squared_error(images.mean(0, keepdim=True).expand_as(images), images).mean()
    assert error(network.encode(images)) < blank / 5
    assert max(error(layers) for layers in alone.unbind(1)) < blank / 2
    metrics = checkpoints.read_json(SHIPPED.with_suffix(".metrics.json"))
    assert not metrics["quick"] and metrics["images"] == 60_000 and metrics["test"]["images"] == 10_000
    assert SHIPPED.stat().st_size < 15e6
