"""CapsNet on pairs of digits: its loss written as loops, what each capsule draws, and its training."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from capsnb.baselines.capsnet import CapsNet
from capsnb.baselines.capsnet_pairs import PAIRS, PairsCapsNet, longest, start_from, train_on_pairs
from capsnb.capsules import squash
from capsnb.evaluation import CLASSES
from capsnb.multi_mnist import draw_pairs

SIZES = dict(channels=3, types=2, primary_dim=3, dim=5, first_hidden=7, second_hidden=11)
SMALL = replace(PAIRS, **SIZES, epochs=1.0, batch=11)


def small(**changes):
    torch.manual_seed(5)
    return PairsCapsNet(replace(SMALL, **changes))


def test_the_network_has_the_11_36_million_parameters_that_the_paper_gives_for_pairs():
    assert sum(tensor.numel() for tensor in PairsCapsNet().parameters()) == 11_361_808


def test_the_training_loss_has_both_classes_there_and_each_digit_alone_to_reconstruct(digits):
    network = small(initial_deviation=3.0, reconstruction_weight=0.7)
    images, labels, total = digits[0][:13], digits[1][:13], 0.0
    torch.manual_seed(3)
    pairs = draw_pairs(images, labels, 13, rng=torch.default_generator)
    for capsules, two, classes in zip(network.encode(pairs.images), pairs.digits, pairs.labels.tolist()):
        for k in range(CLASSES):
            v = capsules[k].norm().item()
            total += max(0, 0.9 - v) ** 2 if k in classes else 0.5 * max(0, v - 0.1) ** 2
        for digit, k in zip(two, classes):
            alone = torch.zeros(CLASSES, 5)
            alone[k] = capsules[k]
            pixels = network.decode(alone[None])[0]
            total += 0.7 * sum((a - b) ** 2 for a, b in zip(pixels.flatten().tolist(), digit.flatten().tolist()))
    torch.manual_seed(3)
    assert network(images, labels.float()).item() == pytest.approx(total / 13, rel=1e-5)


def test_the_same_digits_make_other_pairs_every_time(digits):
    network = small()
    losses = [network(digits[0][:13], digits[1][:13].float()).item() for _ in range(2)]
    assert losses[0] != losses[1]


def test_the_longest_capsules_come_in_the_order_of_their_lengths(double):
    capsules = squash(double(23, CLASSES, 5))
    expected = [sorted(range(CLASSES), key=lambda j: -image[j].norm())[:3] for image in capsules]
    assert longest(capsules, 3).tolist() == expected


def test_every_reconstruction_sees_one_capsule_alone(double):
    network, capsules = small().eval(), squash(double(7, CLASSES, 5)).float()
    classes = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5], [3, 5, 8], [9, 7, 3], [2, 3, 8], [4, 6, 2]])
    found = network.reconstruct_each(capsules, classes)
    assert found.shape == (7, 3, 1, 36, 36)
    for image in range(7):
        for place in range(3):
            alone = torch.zeros(1, CLASSES, 5)
            alone[0, classes[image, place]] = capsules[image, classes[image, place]]
            assert_close(found[image, place], network.decode(alone)[0])


def test_the_convolutions_of_single_digits_are_taken_over_and_nothing_else(digits):
    network, before = small(), small()
    trained = CapsNet(replace(SMALL, size=28))
    start_from(network, trained)
    assert_close(network.convolutions(digits[0][:3]), trained.convolutions(digits[0][:3]))
    changed = {name for name, old in before.state_dict().items() if not torch.equal(old, network.state_dict()[name])}
    assert changed == {f"convolutions.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}


def test_training_lowers_the_loss_and_one_that_was_interrupted_ends_with_the_same_weights(
    digits, tmp_path, monkeypatch
):
    monkeypatch.setattr("capsnb.training._SECONDS_BETWEEN_CHECKPOINTS", -1)
    images, labels = digits[0][:101], digits[1][:101]
    settings = dict(channels=7, epochs=8.0, batch=20, learning_rate=2e-2)

    def train(network, path, updates):
        steps = zip(range(updates), train_on_pairs(network, images, labels, seed=1, checkpoint=path))
        return [step.loss for _, step in steps], network.state_dict()

    losses, whole = train(small(**settings), tmp_path / "whole", 99)
    assert len(losses) == 40 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    train(small(**settings), tmp_path / "parts", 4)
    assert_close(train(small(**settings), tmp_path / "parts", 99)[1], whole, rtol=0, atol=0)


def test_images_of_another_size_are_refused(digits, as_users_run):
    with pytest.raises(ValueError, match="28, 28"):
        next(train_on_pairs(small(), digits[0][:, :, 1:], digits[1], seed=0))
