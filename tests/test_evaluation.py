"""The measures of a trained model."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from capsnb import data, evaluation
from capsnb.evaluation import (
    activation_measures,
    assignment_accuracy,
    contingency,
    effective_rank,
    is_negative,
    kmeans_purity,
    linear_probe,
    purity,
    ranks,
    sample_measures,
    single_capsule_images,
    svm_probe,
    winner,
    winner_measures,
)
from capsnb.sampling import sample_poses


def capsules_won_by(winners, count, dim=3):
    """Poses of which the given capsules are the longest."""
    capsules = torch.full((len(winners), count, dim), 0.1)
    capsules[torch.arange(len(winners)), torch.as_tensor(winners)] = -0.4
    return capsules


def test_the_winner_is_the_longest_capsule():
    assert winner(capsules_won_by([2, 0, 4], 5)).tolist() == [2, 0, 4]


def test_the_contingency_table_counts_as_a_loop_does(rng):
    groups, labels = torch.randint(7, (211,), generator=rng), torch.randint(10, (211,), generator=rng)
    expected = np.zeros((7, 10), dtype=int)
    for group, label in zip(groups.tolist(), labels.tolist()):
        expected[group, label] += 1
    table = contingency(groups, labels, 7)
    assert table.tolist() == expected.tolist()
    assert purity(table) == pytest.approx(sum(max(row) for row in expected) / 211)


def test_ranks_are_counted_and_scores_compared_to_the_largest_as_in_loops(rng):
    score = torch.rand(101, 5, generator=rng) + 1
    found = ranks(score)
    share, frequency = np.zeros(5), np.zeros((5, 5))
    for row in score.numpy():
        order = sorted(range(5), key=lambda j: -row[j])
        for rank, j in enumerate(order):
            share[rank] += row[j] / row[order[0]] / 101
            frequency[j, rank] += 1 / 101
    assert np.allclose(found["share_of_largest"], share) and np.allclose(found["rank_frequency"], frequency)


def test_the_purity_of_a_worked_example():
    """Capsule 0 wins 3, 3, 5 (2 of 3 its commonest), capsule 1 wins 7 (1 of 1): 3 of 4."""
    table = contingency(torch.tensor([0, 0, 0, 1]), torch.tensor([3, 3, 5, 7]), 2)
    assert purity(table) == 0.75


def test_the_assignment_accuracy_is_the_best_of_all_ways_to_give_every_class_a_group_of_its_own(rng):
    table = torch.randint(1, 50, (3, 10), generator=rng)
    ways = itertools.permutations(range(10), 3)
    best = max(sum(table[group, label].item() for group, label in enumerate(way)) for way in ways)
    assert assignment_accuracy(table) == pytest.approx(best / table.sum().item())
    more_groups = torch.zeros(12, 10, dtype=torch.long)
    more_groups[0, 0], more_groups[1, 0], more_groups[2, 1] = 5, 3, 2
    assert assignment_accuracy(more_groups) == pytest.approx(0.7)


def test_the_svm_probe_separates_what_no_line_separates(rng):
    """Two classes, one around the other."""
    capsules = torch.randn(600, 3, 2, generator=rng)
    labels = (capsules.flatten(1).square().sum(1) > 5).long()
    assert svm_probe(capsules[:400], labels[:400], capsules[400:], labels[400:]) > 0.9
    assert linear_probe(capsules[:400], labels[:400], capsules[400:], labels[400:]) < 0.75


def test_the_measures_of_the_winner_of_a_worked_example():
    """Of 200 images capsule 0 wins 120, capsule 1 wins 79 and capsule 2 wins 1, fewer than 1%."""
    winners = [0] * 120 + [1] * 79 + [2]
    labels = torch.tensor([4] * 100 + [9] * 20 + [4] * 79 + [6])
    assert winner_measures(capsules_won_by(winners, 5), labels) == {
        "purity": pytest.approx(180 / 200),
        "assignment_accuracy": pytest.approx(101 / 200),
        "capsules_in_use": 2,
        "classes_covered": 1,
        "winning_share": pytest.approx([0.6, 0.395, 0.005, 0, 0]),
        "commonest_class": [4, 4, 6, 0, 0],
    }


def test_a_capsule_with_exactly_one_percent_is_in_use():
    winners = [0] * 99 + [1]
    assert winner_measures(capsules_won_by(winners, 2), torch.zeros(100, dtype=torch.long))["capsules_in_use"] == 2


def test_the_activations_of_a_worked_example():
    capsules = torch.zeros(2, 3, 2)
    capsules[0, 0], capsules[0, 1], capsules[1, 2] = torch.tensor([[0.6, 0.0], [0.0, 0.9], [0.3, 0.0]])
    assert activation_measures(capsules) == {
        "activation_longest": pytest.approx((0.9 + 0.3) / 2),
        "activation_mean": pytest.approx(1.8 / 6),
        "capsules_on_per_image": pytest.approx(1.0),
    }


def test_the_effective_rank_is_1_for_rank_1_and_full_for_equal_singular_values(double):
    one = torch.einsum("i,d,e->ide", double(11), double(5), double(3))[:, None].expand(11, 2, 5, 3)
    assert effective_rank(one) == pytest.approx(1.0)
    rows = torch.linalg.qr(double(33, 5)).Q.T.reshape(5, 11, 3)  # five orthonormal rows of 11·3
    assert effective_rank(rows.transpose(0, 1)[:, None]) == pytest.approx(5.0)


def test_the_effective_rank_is_the_exponential_entropy_written_as_a_loop(double):
    W, ranks = double(11, 2, 5, 3), []
    for j in range(2):
        matrix = np.concatenate([W[i, j].numpy() for i in range(11)], axis=1)
        shares = np.linalg.svd(matrix, compute_uv=False) ** 2
        shares = shares / shares.sum()
        ranks.append(math.exp(-sum(s * math.log(s) for s in shares)))
    assert effective_rank(W) == pytest.approx(np.mean(ranks))


def test_the_linear_probe_reads_what_is_linear_and_guesses_what_is_not_there(rng):
    labels, truth = torch.randint(3, (307,), generator=rng), torch.randint(3, (211,), generator=rng)
    directions = torch.randn(3, 5, 7, generator=rng)

    def noise(count):
        return torch.randn(count, 5, 7, generator=rng)

    def seen(classes):
        return 1e-4 * (directions[classes] + 0.1 * noise(len(classes)))  # also when everything is small

    assert linear_probe(seen(labels), labels, seen(truth), truth) > 0.98
    assert linear_probe(noise(307), labels, noise(211), truth) < 0.5


def test_k_means_finds_clusters_that_are_there(rng):
    centres = torch.randn(5, 17, generator=rng)
    classes, truth = torch.randint(5, (211,), generator=rng), torch.randint(5, (101,), generator=rng)
    train, test = centres[classes], centres[truth]
    noisy = [part + 0.01 * torch.randn(part.shape, generator=rng) for part in (train, test)]
    assert kmeans_purity(*noisy, truth, clusters=5) == 1.0
    assert kmeans_purity(*noisy, truth, clusters=1) == pytest.approx(torch.bincount(truth).max().item() / 101)


def test_digits_are_no_negatives_and_their_inverses_are(digits):
    real, images = digits[0][:500], data.load("mnist", "test", sample=True)[0][:101]
    assert is_negative(images, real).float().mean() < 0.02
    assert is_negative(1 - images, real).float().mean() > 0.98


def test_brightness_and_contrast_do_not_make_a_negative(digits):
    real = digits[0][:101]
    assert torch.equal(is_negative(0.4 + 0.1 * real[:31], real), is_negative(real[:31], real))
    assert not is_negative(torch.full((1, 1, 28, 28), 0.7), real).any()


def test_single_capsule_images_are_the_decoded_samples_of_one_capsule_each(small_model):
    images = single_capsule_images(small_model, 3, domain="fitted", rng=torch.Generator().manual_seed(5))
    poses = sample_poses(3, small_model.poses, domain="fitted", rng=torch.Generator().manual_seed(5))
    assert images.shape == (3, 5, 1, 28, 28)
    for row in range(3):
        for capsule in range(5):
            layer = torch.zeros(1, 5, 7)
            layer[0, capsule] = poses[row, capsule]
            assert_close(images[row, capsule], small_model.decode(layer)[0])


def test_the_measures_of_samples_are_those_of_the_images_drawn(small_model, digits, monkeypatch):
    """Capsule 0 shows one digit again and again; capsule 1 a flat grey and the negative of a digit in turn."""
    real = digits[0][:101]
    column0 = real[:1].expand(4, -1, -1, -1)
    column1 = torch.stack([torch.full_like(real[0], 0.5), 1 - real[0]] * 2)
    images = torch.stack([column0, column1], dim=1)
    monkeypatch.setattr(evaluation, "single_capsule_images", lambda *arguments, **options: images)
    found = sample_measures(small_model, real, rows=4, rng=torch.Generator())
    assert set(found) == {"complete", "restricted", "fitted"}
    for values in found.values():
        assert values["negative_share"] == pytest.approx(2 / 8)
        assert values["contrast"] == pytest.approx((6 * real[0].std().item()) / 8)
        half = np.stack([np.full((28, 28), 0.5), 1 - real[0, 0].numpy()] * 2)
        assert values["variation_within_capsule"] == pytest.approx(half.std(0, ddof=1).mean() / 2, rel=1e-5)


@pytest.fixture(scope="module")
def splits():
    train, test = (data.load("mnist", split, sample=True) for split in ("train", "test"))
    return (train[0][:307], train[1][:307]), (test[0][:263], test[1][:263])


def test_all_measures_are_those_of_the_parts_and_can_be_written_as_json(small_model, splits):
    (train, train_labels), (test, labels) = splits
    measures = evaluation.evaluate(small_model, *splits, seed=3)
    assert json.loads(json.dumps(measures)) == measures
    assert (measures["train_images"], measures["test_images"]) == (307, 263)
    capsules = small_model.encode(test)
    assert measures.items() >= winner_measures(capsules, labels).items()
    assert measures.items() >= activation_measures(capsules).items()
    probed = linear_probe(small_model.encode(train), train_labels, capsules, labels)
    assert measures["linear_probe"] == pytest.approx(probed, abs=0.02)  # its training poses come from half precision
    error = (small_model.reconstruct(test) - test).square().mean().item()
    assert measures["reconstruction_mse"] == pytest.approx(error, rel=1e-4)
    with torch.no_grad():
        through_stage_1 = small_model.autoencoder.image(small_model.autoencoder.features(test))
    assert measures["autoencoder_mse"] == pytest.approx((through_stage_1 - test).square().mean().item(), rel=1e-4)
    assert measures["kmeans_purity"] == kmeans_purity(train, test, labels, seed=3)
    assert measures["effective_rank"] == effective_rank(small_model.encoder.W.detach())


def test_the_same_seed_gives_the_same_measures_twice(small_model, splits):
    first, second = (evaluation.evaluate(small_model, *splits, seed=3)["samples"] for _ in range(2))
    assert first == second
    assert first != evaluation.evaluate(small_model, *splits, seed=4)["samples"]
