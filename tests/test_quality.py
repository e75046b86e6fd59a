"""The measures of samples against closed forms and plain loops."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch.testing import assert_close

from capsnb import quality
from capsnb.quality import (
    ball_counts,
    ball_radii,
    class_measures,
    compare,
    density_coverage,
    frechet_distance,
    kernel_distance,
    nearest_neighbours,
    precision_recall,
)

N, M, F = 31, 23, 5


@pytest.fixture
def clouds(double):
    """Two clouds that overlap in part."""
    return double(N, F), 0.8 * double(M, F) + torch.tensor([1.5, 0, 0, 0, 0]).double()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(quality, "_PART", 7)


def distance(a, b):
    return np.sqrt(np.sum((a - b) ** 2))


def radii(points, k):
    return [sorted(distance(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]


def test_the_frechet_distance_of_clouds_with_known_moments_is_the_one_in_closed_form(double):
    """In the same axes it is |m - m'|² plus the squared differences of the deviations."""
    white = torch.linalg.qr(torch.cat([torch.ones(N, 1).double(), double(N, F)], dim=1)).Q[:, 1:] * (N - 1) ** 0.5
    turn = torch.linalg.qr(double(F, F)).Q
    one, other = torch.tensor([1.0, 2, 3, 0, 1]).double(), torch.tensor([2.0, 2, 1, 1, 0]).double()
    shift = torch.tensor([0.0, 3, 0, 4, 0]).double()
    found = frechet_distance(white * one @ turn, (white.flip(0) * other + shift) @ turn)
    assert found == pytest.approx(25 + (1 + 0 + 4 + 1 + 1))


def test_the_frechet_distance_is_heusels_formula_with_scipys_matrix_root(clouds):
    x, y = (cloud.numpy() for cloud in clouds)
    product = np.cov(x.T) @ np.cov(y.T)
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * sqrtm(product).real)
    assert frechet_distance(*clouds) == pytest.approx(expected)


def test_images_have_no_frechet_distance_to_themselves_even_when_a_feature_is_always_zero(clouds):
    real = clouds[0].clone()
    real[:, 3] = 0
    assert frechet_distance(real, real.flip(0)) == pytest.approx(0, abs=1e-9)


def test_fewer_images_than_features_have_a_frechet_distance_too(double):
    x, y = double(3, F), double(2, F)
    product = np.cov(x.numpy().T) @ np.cov(y.numpy().T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(product).real, 0)).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum() - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-6)


def test_the_kernel_distance_of_all_images_is_the_unbiased_estimate_in_loops(clouds, rng):
    x, y = (cloud[:M].numpy() for cloud in clouds)

    def kernel(a, b):
        return (np.dot(a, b) / F + 1) ** 3

    pairs = [(i, j) for i in range(M) for j in range(M)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / (M * (M - 1))
    between = sum(kernel(x[i], y[j]) for i, j in pairs) / M**2
    mean, deviation = kernel_distance(clouds[0][:M], clouds[1], subsets=3, size=M, rng=rng)
    assert mean == pytest.approx(within - 2 * between) and deviation == pytest.approx(0, abs=1e-9)


def test_the_kernel_distance_between_halves_of_one_cloud_is_zero_on_average(double, rng):
    real = double(4001, F)
    mean, deviation = kernel_distance(real[:2003], real[2003:], subsets=50, size=101, rng=rng)
    assert deviation > 0.01 and abs(mean) < 3 * deviation / 50**0.5


def test_the_subsets_of_the_kernel_distance_are_drawn_anew_and_by_the_generator(clouds):
    def found(seed):
        return kernel_distance(*clouds, subsets=5, size=11, rng=torch.Generator().manual_seed(seed))

    assert found(1) == found(1) and found(1) != found(2) and found(1)[1] > 0


def test_precision_and_recall_are_those_of_loops_over_balls(clouds):
    x, y = (cloud.numpy() for cloud in clouds)

    def share(points, centres, k):
        reach = radii(centres, k)
        return np.mean([any(distance(p, c) <= r for c, r in zip(centres, reach)) for p in points])

    found = precision_recall(*clouds, neighbours=2)
    assert found == pytest.approx((share(y, x, 2), share(x, y, 2)))
    assert 0 < found[0] < 1 and 0 < found[1] < 1 and found[0] != found[1]


def test_density_and_coverage_are_those_of_loops_over_balls(clouds):
    x, y = (cloud.numpy() for cloud in clouds)
    inside = np.array([[distance(f, r) <= reach for r, reach in zip(x, radii(x, 4))] for f in y])
    expected = inside.sum() / (4 * M), inside.any(0).mean()
    found = density_coverage(*clouds, neighbours=4)
    assert found == pytest.approx(expected) and 0 < found[1] < 1


def test_samples_of_one_kind_are_precise_and_cover_little(double):
    two_kinds = torch.cat([double(47, F), double(47, F) + 50])
    precision, recall = precision_recall(two_kinds, double(47, F) * 0.1)
    _, coverage = density_coverage(two_kinds, double(47, F) * 0.1)
    assert precision == 1 and recall < 0.05 and coverage < 0.51


def test_the_same_picture_again_and_again_recalls_only_itself(double):
    real = double(N, F)
    precision, recall = precision_recall(real, real[3].expand(M, F))
    assert precision == 1 and recall == pytest.approx(1 / N)


def test_balls_are_counted_by_points_and_by_balls(double):
    points, centres = double(M, F), double(N, F)
    radius = ball_radii(centres, 6)
    assert_close(radius, torch.tensor(radii(centres.numpy(), 6)))
    inside = (points[:, None] - centres).square().sum(2).sqrt() <= radius
    by_point, by_ball = ball_counts(points, centres, radius)
    assert torch.equal(by_point, inside.sum(1)) and torch.equal(by_ball, inside.sum(0))


def test_nearest_neighbours_are_those_of_a_full_sort(clouds):
    x, y = clouds
    distances, rows = nearest_neighbours(x, y, count=3)
    ordered = (x[:, None] - y).square().sum(2).sqrt().sort(1)
    assert_close(distances, ordered.values[:, :3])
    assert torch.equal(rows, ordered.indices[:, :3])


def test_the_measures_of_classes_made_by_hand():
    sure, unsure = [0.95, 0.05, 0.0], [0.2, 0.2, 0.6]
    found = class_measures(torch.tensor([sure, sure, sure, unsure]).double())
    assert found["confident"] == 0.75 and found["class_share"] == [0.75, 0, 0.25]
    assert found["class_entropy"] == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))
    entropies = [-sum(p * np.log(p) for p in row if p) for row in (sure, sure, sure, unsure)]
    assert found["sample_entropy"] == pytest.approx(np.mean(entropies))


def test_a_comparison_holds_every_measure_and_the_numbers_of_images(clouds, rng):
    found = compare(*clouds, rng=rng)
    assert found["real"] == N and found["samples"] == M
    assert found["fid"] == frechet_distance(*clouds)
    assert (found["precision"], found["recall"]) == precision_recall(*clouds)
    assert (found["density"], found["coverage"]) == density_coverage(*clouds)
    assert found["kid"] > 5 * found["kid_deviation"] / 10


def test_too_few_images_and_features_that_are_not_numbers_are_refused(clouds, rng):
    with pytest.raises(ValueError, match="23 images, expected at least 24"):
        kernel_distance(*clouds, size=24, rng=rng)
    with pytest.raises(ValueError, match="expected at least 4"):
        precision_recall(clouds[0][:3], clouds[1])
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(clouds[0] / 0, clouds[1])
