"""CapsNet: its parts against Sabour 2017 written as loops, its training, and numbers at their limits."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from capsnb import checkpoints, data
from capsnb.baselines.capsnet import (
    PERTURBATIONS,
    SHIPPED,
    CapsNet,
    CapsNetSettings,
    class_lengths,
    load_capsnet,
    margin_loss,
    mask,
    train_capsnet,
)
from capsnb.baselines.capsule_network import route_with_gradient
from capsnb.capsules import squash
from capsnb.evaluation import CLASSES, winner

SMALL = CapsNetSettings(
    channels=3, types=2, primary_dim=3, dim=5, first_hidden=7, second_hidden=11, shift=0, epochs=1.0, batch=11
)
B, I, J, D, E = 3, 7, 5, 11, 13  # noqa: E741


def small(**changes):
    torch.manual_seed(5)
    return CapsNet(replace(SMALL, **changes))


def test_the_network_has_the_sizes_of_the_paper_and_so_its_8_2_million_parameters():
    network = CapsNet()
    assert network.W.shape == (32 * 6 * 6, 10, 16, 8)
    assert sum(tensor.numel() for tensor in network.parameters()) == 8_215_568


def test_the_margin_loss_is_equation_4_of_the_paper_written_as_loops(rng):
    lengths, labels = torch.rand(23, 7, generator=rng, dtype=torch.float64), torch.randint(7, (23, 2), generator=rng)
    there = torch.zeros(23, 7, dtype=torch.bool).scatter(1, labels, True)  # one class or two: MultiMNIST has two
    found = margin_loss(lengths, there, SMALL)
    for image in range(23):
        total = 0.0
        for k in range(7):
            t, v = float(k in labels[image]), lengths[image, k].item()
            total += t * max(0, 0.9 - v) ** 2 + 0.5 * (1 - t) * max(0, v - 0.1) ** 2
        assert found[image].item() == pytest.approx(total)


def test_the_training_loss_is_the_margin_loss_and_weighted_squares_of_the_reconstruction_by_the_right_class(digits):
    network, images, labels = small(initial_deviation=3.0, reconstruction_weight=0.7), digits[0][:13], digits[1][:13]
    capsules, total = network.encode(images), 0.0
    for image, label, vectors in zip(images, labels, capsules):
        alone = torch.zeros(CLASSES, 5)
        alone[label] = vectors[label]
        pixels = network.decode(alone[None])[0]
        for k in range(CLASSES):
            v = vectors[k].norm().item()
            total += max(0, 0.9 - v) ** 2 if k == label else 0.5 * max(0, v - 0.1) ** 2
        total += 0.7 * sum((a - b) ** 2 for a, b in zip(pixels.flatten().tolist(), image.flatten().tolist()))
    assert network(images, labels.float()).item() == pytest.approx(total / 13, rel=1e-5)


def test_images_are_moved_before_they_are_encoded_and_reconstructed(digits):
    still, images, labels = small(), digits[0][:1], digits[1][:1].float()
    moving, found, allowed = small(shift=1), set(), set()
    for down in range(-1, 2):
        for right in range(-1, 2):
            allowed.add(round(still(images.roll((down, right), (2, 3)), labels).item(), 5))
    for seed in range(40):
        torch.manual_seed(seed)
        found.add(round(moving(images, labels).item(), 5))
    assert found == allowed and len(allowed) > 1


def test_a_reconstruction_sees_the_capsule_of_its_class_alone(double):
    network, capsules = small().eval(), squash(double(11, CLASSES, 5)).float()
    classes = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
    others = capsules + torch.randn(11, CLASSES, 5) * (torch.arange(CLASSES) != classes[:, None]).unsqueeze(2)
    found = network.reconstruct(capsules, classes)
    assert_close(network.reconstruct(others, classes), found)
    assert not torch.allclose(network.reconstruct(2 * capsules, classes), found)
    rows = mask(capsules, classes)
    assert_close(rows.sum(1), capsules[torch.arange(11), classes])
    assert (rows.abs().sum(2).argmax(1) == classes).all()
    assert found.shape == (11, 1, 28, 28) and found.min() >= 0 and found.max() <= 1


def test_without_classes_the_longest_capsule_reconstructs(double):
    network, capsules = small().eval(), squash(double(11, CLASSES, 5)).float()
    longest = torch.tensor([max(range(CLASSES), key=lambda j: image[j].norm()) for image in capsules])
    assert torch.equal(winner(capsules), longest)
    assert_close(network.reconstruct(capsules), network.reconstruct(capsules, longest))


def test_a_perturbation_adds_to_one_number_of_the_longest_capsule_and_does_not_change_which_that_is(double):
    network, capsules = small().eval(), squash(double(7, CLASSES, 5)).float()
    capsules[2] *= 0.01  # here the smallest change makes another capsule the longest
    before, found = capsules.clone(), network.perturb(capsules, 3, (-0.2, 0.0, 0.3))
    assert found.shape == (7, 3, 1, 28, 28) and torch.equal(capsules, before)
    for image in range(7):
        for step, amount in enumerate((-0.2, 0.0, 0.3)):
            longest, changed = int(capsules[image].norm(dim=1).argmax()), torch.zeros(1, CLASSES, 5)
            changed[0, longest] = capsules[image, longest]
            changed[0, longest, 3] += amount
            assert_close(found[image, step], network.decode(changed)[0])


def test_the_perturbations_of_the_paper_are_steps_of_0_05_within_a_quarter():
    assert PERTURBATIONS == (-0.25, -0.2, -0.15, -0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.2, 0.25)


def test_images_of_36_pixels_have_primary_capsules_at_10_times_10_positions(rng):
    network, images = small(size=36), torch.rand(2, 1, 36, 36, generator=rng)
    assert len(network.W) == 100 * 2
    assert network.reconstruct(network.encode(images)).shape == images.shape
    assert network(images, torch.tensor([3.0, 5.0])).isfinite()


# Numbers at their limits


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e15])
@pytest.mark.parametrize("lower, upper", [(I, J), (1, J), (I, 1), (1, 1)])
def test_zero_tiny_and_huge_votes_and_single_capsules_have_finite_capsules_and_gradients(double, scale, lower, upper):
    """Huge votes make huge logits: from round 2 on a lower capsule gives everything to one upper capsule."""
    x, W = squash(double(B, lower, E)).float(), (scale * double(lower, upper, D, E)).float()
    x[0] = 0
    x.requires_grad_()
    W.requires_grad_()
    capsules = squash(route_with_gradient(x, W, 3).z)
    there = torch.zeros(B, upper, dtype=torch.bool)
    there[:, 0] = True
    loss = margin_loss(class_lengths(capsules), there, SMALL).sum() + capsules.sum()
    assert capsules.isfinite().all() and (class_lengths(capsules) <= 1 + 1e-6).all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (x, W)))
    assert (capsules[0] == 0).all()


def test_the_empty_image_has_a_finite_loss_and_gradient_in_a_network_without_biases():
    network = small()
    with torch.no_grad():
        for layer in (0, 2):
            network.convolutions[layer].bias.zero_()
    loss = network(torch.zeros(2, 1, 28, 28), torch.tensor([3.0, 5.0]))
    loss.backward()
    assert loss.isfinite() and all(tensor.grad.isfinite().all() for tensor in network.parameters())
    assert (network.encode(torch.zeros(1, 1, 28, 28)) == 0).all()


# Training and files


def test_training_lowers_the_loss_and_ends_in_evaluation_mode(digits):
    network = small(channels=7, epochs=10.0, batch=20, learning_rate=5e-3)
    losses = [step.loss for step in train_capsnet(network, digits[0][:100], digits[1][:100], seed=0)]
    assert len(losses) == 50 and sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert not network.training


def test_training_that_was_interrupted_ends_with_the_same_weights(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("capsnb.training._SECONDS_BETWEEN_CHECKPOINTS", -1)
    images, labels = digits[0][:97], digits[1][:97]

    def train(network, path, updates):
        for _, _ in zip(range(updates), train_capsnet(network, images, labels, seed=1, checkpoint=path)):
            pass
        return network.state_dict()

    whole = train(small(shift=2), tmp_path / "whole", 99)
    train(small(shift=2), tmp_path / "parts", 4)
    assert_close(train(small(shift=2), tmp_path / "parts", 99), whole, rtol=0, atol=0)


def test_images_of_another_range_or_size_are_refused(digits):
    with pytest.raises(ValueError, match="divide 8-bit images by 255"):
        small().encode(digits[0] * 255)
    with pytest.raises(ValueError, match="36, 36"):
        small(size=36).encode(digits[0])
    with pytest.raises(ValueError, match="36, 36"):
        next(train_capsnet(small(size=36), *digits, seed=0))


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="capsnet.safetensors does not exist"):
        load_capsnet(tmp_path / "capsnet.safetensors")


def test_the_shipped_capsnet_reads_the_shipped_digits_and_its_measures_lie_beside_it():
    images, labels = data.load("mnist", "test", sample=True)
    wrong = (winner(load_capsnet().encode(images)) != labels).sum()
    metrics = checkpoints.read_json(SHIPPED.with_suffix(".metrics.json"))
    assert wrong <= 10
    assert not metrics["quick"] and metrics["images"] == 60_000 and metrics["test"]["images"] == 10_000
    assert metrics["test"]["error"] == metrics["test"]["wrong"] / 10_000 <= 0.005
    assert SHIPPED.stat().st_size < 15e6
