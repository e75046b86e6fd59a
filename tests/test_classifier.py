"""The classifier whose features samples are compared in: what its parts compute, and what the shipped one can do."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from capsnb import checkpoints, data
from capsnb.classifier import (
    CLASSES,
    Classifier,
    ClassifierSettings,
    load_classifier,
    shift_at_random,
    train_classifier,
)
from capsnb.pretrained import WEIGHTS

SMALL = ClassifierSettings(first_channels=3, channels=5, features=7, epochs=1.0, batch=11)


def small(**changes):
    torch.manual_seed(5)
    return Classifier(replace(SMALL, **changes))


def test_a_shift_moves_the_whole_image_and_lets_zeros_in(rng):
    images, most = torch.rand(211, 1, 28, 28, generator=rng) + 0.1, 2
    torch.manual_seed(3)
    moved, seen = shift_at_random(images, most), set()
    for image, result in zip(images[:, 0], moved[:, 0]):
        fits = []
        for down in range(-most, most + 1):
            for right in range(-most, most + 1):
                expected = torch.zeros(28, 28)
                for row in range(max(0, down), min(28, 28 + down)):
                    columns = slice(max(0, right), min(28, 28 + right))
                    expected[row, columns] = image[row - down, columns.start - right : columns.stop - right]
                fits += [(down, right)] if torch.equal(expected, result) else []
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) == 25


def test_no_shift_leaves_images_alone(digits):
    assert torch.equal(shift_at_random(digits[0][:5], 0), digits[0][:5])


def test_probabilities_are_the_softmax_of_a_linear_map_of_the_features(digits):
    classifier = small().eval()
    features = classifier.features(digits[0][:13])
    logits = features @ classifier.output.weight.T + classifier.output.bias
    assert features.shape == (13, 7) and (features >= 0).all()
    assert_close(classifier.probabilities(digits[0][:13]), logits.exp() / logits.exp().sum(1, keepdim=True))
    assert_close(classifier.classify(features), classifier.probabilities(digits[0][:13]))


def test_the_loss_without_shifts_is_the_cross_entropy_of_the_labels(digits):
    classifier = small(shift=0).eval()
    images, labels = digits[0][:13], digits[1][:13]
    expected = -classifier.probabilities(images)[torch.arange(13), labels].log().mean()
    assert_close(classifier(images, labels.float()), expected)


def test_images_in_parts_have_the_features_of_images_together(digits, monkeypatch):
    classifier = small().eval()
    together = classifier.features(digits[0][:17])
    monkeypatch.setattr("capsnb.classifier._PART", 5)
    assert_close(classifier.features(digits[0][:17]), together)


def test_training_lowers_the_loss_and_ends_in_evaluation_mode(digits):
    images, labels = digits[0][:220], digits[1][:220]
    classifier = small(shift=0, epochs=6.0, batch=20, learning_rate=0.05)
    losses = [step.loss for step in train_classifier(classifier, images, labels, seed=0)]
    assert len(losses) == 66 and sum(losses[-11:]) < 0.8 * sum(losses[:11])
    assert not classifier.training


def test_training_that_was_interrupted_ends_with_the_same_weights(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("capsnb.training._SECONDS_BETWEEN_CHECKPOINTS", -1)
    images, labels = digits[0][:97], digits[1][:97]

    def train(classifier, path, updates):
        for _, _ in zip(range(updates), train_classifier(classifier, images, labels, seed=1, checkpoint=path)):
            pass
        return classifier.state_dict()

    whole = train(small(), tmp_path / "whole", 99)
    train(small(), tmp_path / "parts", 4)
    assert_close(train(small(), tmp_path / "parts", 99), whole, rtol=0, atol=0)


def test_images_of_another_range_and_unknown_data_sets_are_refused(digits):
    with pytest.raises(ValueError, match="divide 8-bit images by 255"):
        small().features(digits[0] * 255)
    with pytest.raises(ValueError, match="unknown data set with a classifier 'kmnist'; choose one of 'mnist'"):
        load_classifier("kmnist")


# The weights that ship


def test_the_shipped_classifier_knows_the_digits_of_the_sample():
    images, labels = data.load("mnist", "test", sample=True)
    classifier = load_classifier()
    probability = classifier.probabilities(images)
    assert (probability.argmax(1) == labels).float().mean() >= 0.985
    assert F.nll_loss(probability.log(), labels) < 0.06
    assert not classifier.training and probability.shape == (1000, CLASSES)


def test_the_shipped_classifier_is_small_and_its_measures_lie_beside_it():
    path = WEIGHTS / "classifier-mnist.safetensors"
    assert path.stat().st_size <= 1e6
    metrics = checkpoints.read_json(path.with_suffix(".metrics.json"))
    assert metrics["images"] == 60_000 and metrics["quick"] is False
    assert metrics["test"]["images"] == 10_000 and metrics["test"]["accuracy"] >= 0.992
