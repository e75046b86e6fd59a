"""The experiment with capsules on S^m x R^n x (0, 1): what it measures and that it runs; no outcome is asserted."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from threadpoolctl import threadpool_limits
from torch.testing import assert_close

import capsnb
from capsnb import checkpoints, load_pretrained
from capsnb.product_capsules import Space, states_of
from capsnb.sampling import one_at_a_time
from capsnb.settings import DecoderSettings
from experiments import product_capsules
from experiments.bases import BASES
from experiments.product_capsules import STAGE1, VARIANTS, facts, main, settings_of
from experiments.product_measures import (
    STEPS,
    Encoded,
    euclidean_measures,
    explained_share,
    features,
    mean_direction,
    mean_ink,
    read_out,
    sign_known,
    sweeps,
)
from experiments.results import Results

SPACE = Space(sphere=3)  # S^2 x R^4


def test_every_space_takes_as_many_numbers_and_differs_from_the_first_in_one_choice():
    first = asdict(Space())
    changed = {name: {key for key in first if asdict(space)[key] != first[key]} for name, space in VARIANTS.items()}
    assert changed.pop("s7-r8") == set() and [len(fields) for fields in changed.values()] == [1] * len(changed)
    assert all(space.sphere <= BASES["sparse"].dim for space in VARIANTS.values())


def test_the_explained_share_is_that_of_one_linear_regression_per_capsule(double):
    x, x_test, mix = double(601, 5), double(307, 5), double(3, 5)
    on, on_test = torch.arange(601) % 3, torch.arange(307) % 3
    y, y_test = ((a * mix[b]).sum(1) + 2 * b + double(len(a)) for a, b in ((x, on), (x_test, on_test)))
    error, variance = 0.0, 0.0
    for j in range(3):
        mine, theirs = (on == j).numpy(), (on_test == j).numpy()
        fit = LinearRegression().fit(x.numpy()[mine], y.numpy()[mine])
        error += np.sum((fit.predict(x_test.numpy()[theirs]) - y_test.numpy()[theirs]) ** 2)
        variance += np.sum((y_test.numpy()[theirs] - y.numpy()[mine].mean()) ** 2)
    assert explained_share((x, y, on), (x_test, y_test, on_test)) == pytest.approx(1 - error / variance)


def test_capsules_with_too_few_images_for_a_fit_are_left_out(double):
    x, y, on = double(101, 5), double(101), (torch.arange(101) >= 80).long()
    alone = explained_share((x[:80], y[:80], on[:80]), (x[:80], y[:80], on[:80]))
    assert explained_share((x, y, on), (x, y, on)) == pytest.approx(alone)
    assert explained_share((x[80:], y[80:], on[80:]), (x, y, on)) == 0


def test_direction_line_and_activation_tell_apart_what_each_of_them_holds(double):
    own = double(601, 7)
    found = features(own, SPACE)
    assert list(found) == ["direction", "activation", "line", "all"] and found["all"].shape == (601, 8)
    assert_close(found["line"], own[:, 3:])
    longer = torch.cat([5 * own[:, :3], own[:, 3:]], dim=1)
    assert_close(features(longer, SPACE)["direction"], found["direction"])
    activation = states_of(own.unsqueeze(1), SPACE)[:, 0, :3].norm(dim=1, keepdim=True)
    assert_close(found["activation"], torch.logit(activation))
    assert list(features(own, Space(sphere=7))) == ["direction", "activation", "all"]


@pytest.fixture
def states(rng):
    """Three capsules on S^2 x R^4, the last never on, whose ink grows with the first numbers of both parts."""
    z = torch.randn(601, 3, 7, generator=rng) + torch.tensor([2.0, 2, 0, 0, 0, 9, 9])
    on = torch.arange(601) % 2
    states = states_of(torch.zeros_like(z).scatter(1, on.view(-1, 1, 1).expand(-1, 1, 7), z[:, :1]), SPACE)
    own = states[torch.arange(601), on]
    return states, on, 3 * own[:, 0] + own[:, 3]


def test_the_circle_starts_and_ends_opposite_the_mean_direction_and_stays_on_the_sphere(states):
    circle = sweeps(*states, SPACE)["circle"][:, 0]
    mean = states[0][states[1] == 0, 0].mean(0)
    middle = mean[:3] / mean[:3].norm()
    assert_close(circle[:, :3].norm(dim=1), torch.ones(STEPS))
    assert_close(circle[:, :3] @ middle, torch.linspace(-torch.pi, torch.pi, STEPS).cos())
    assert_close(circle[:, 3:], mean[3:].expand(STEPS, -1))
    assert circle[STEPS // 2 + 1, 0] > circle[STEPS // 2, 0]  # forwards is where the ink grows


def test_the_line_takes_even_steps_of_one_standard_deviation_of_its_linear_fit(states):
    of_states, on, ink = states
    line, r = sweeps(*states, SPACE)["line"][:, 0], of_states[on == 0, 0, 3:].double().numpy()
    fit = LinearRegression().fit(r, ink[on == 0].double().numpy())
    assert_close(line.diff(dim=0), line.diff(dim=0)[:1].expand(STEPS - 1, -1), atol=1e-4, rtol=1e-4)
    assert_close(line[STEPS // 2, 3:].double().numpy(), r.mean(0), atol=1e-4, rtol=1e-4)
    told = fit.predict(line[:, 3:].double().numpy())
    assert np.diff(told).mean() == pytest.approx(fit.predict(r).std(ddof=1), rel=1e-3)
    assert_close(line[:, :3], line[:1, :3].expand(STEPS, -1))


def test_a_capsule_that_wins_nothing_is_not_swept_and_a_sphere_alone_has_no_line(states):
    assert all((swept[:, 2] == 0).all() for swept in sweeps(*states, SPACE).values())
    assert list(sweeps(*states, Space(sphere=7))) == ["circle"]


@pytest.fixture
def product_model(small_model):
    """The small model, with three capsules on S^2 x R^4."""
    small_model.encoder.space = SPACE
    return small_model


def test_the_read_out_is_the_ridge_regression_on_states_and_activations(product_model, double, states):
    codes, lower = states[0].repeat(1, 2, 1)[:, :5], double(601, 72, 3).half()
    reader = read_out(product_model, codes, lower, activation=True)
    code = np.concatenate([codes, np.linalg.norm(codes[..., :3], axis=2, keepdims=True)], axis=2).reshape(601, -1)
    gram = code.T @ code
    ridge = DecoderSettings().ridge * np.diag(gram).mean()
    matrix = np.linalg.solve(gram + ridge * np.eye(len(gram)), code.T @ lower.flatten(1).float().numpy())
    np.testing.assert_allclose(reader.matrix.numpy(), matrix, atol=1e-3, rtol=1e-3)


def test_images_of_single_capsules_are_those_of_their_layers(product_model, double, states):
    codes = states[0].repeat(1, 2, 1)[:, :5]
    reader = read_out(product_model, codes, double(601, 72, 3), activation=False)
    layers = one_at_a_time(codes[:2]).flatten(0, 1)
    with torch.no_grad():
        expected = product_model.image((layers.flatten(1) @ reader.matrix).view(-1, 72, 3))
    found = reader.alone(codes[:2]).flatten(0, 1) / 255
    assert_close(found, expected[:, 0], atol=0.51 / 255, rtol=0)


def test_the_ink_of_a_walk_is_a_mean_over_capsules():
    walk = torch.zeros(3, 2, 28, 28, dtype=torch.uint8)
    walk[1, 0, :5, :7], walk[1, 1, 0, :11] = 255, 255
    assert mean_ink(walk) == pytest.approx([0, (35 + 11) / 2, 0])


def test_the_mean_direction_is_1_for_single_points_of_any_length_and_weighted_by_share(double):
    """Capsule 0 has one direction in 3 of 4 images; capsule 1 has two at right angles, and other Euclidean numbers."""
    own = double(4, 7)
    own[:, :3] = torch.tensor([[9.0, 0, 0], [0.1, 0, 0], [2.0, 0, 0], [0, 5.0, 0]])
    single = Encoded(double(4, 2, 7), torch.tensor([0, 0, 0, 1]), own)
    assert mean_direction(single, SPACE) == pytest.approx(1)
    assert mean_direction(single._replace(on=torch.tensor([0, 0, 1, 1])), SPACE) == pytest.approx(0.5 + 0.5**1.5)


def test_the_sign_is_known_where_the_offset_raises_the_likelihood(double):
    own = double(5, 7)
    own[:, 3] = torch.tensor([1.0, -1, 2, 0, 3])
    found = Encoded(double(5, 2, 7), torch.zeros(5).long(), own)
    assert sign_known(found, SPACE) == pytest.approx(0.6)
    assert sign_known(found, replace(SPACE, offset=0.0)) == sign_known(found, Space(sphere=7)) == 0


def test_the_euclidean_part_is_told_on_the_axis_of_the_offset_and_off_it(small_model):
    poses = small_model.poses
    poses.mean.zero_()
    poses.mean[0, 3], poses.mean[1, 3], poses.mean[1, 4], poses.mean[1, 5], poses.mean[1, 0] = -2.0, 1.0, 3.0, 4.0, 9.0
    poses.share.copy_(torch.tensor([0.75, 0.25, 0, 0, 0]))
    poses.covariance.copy_(torch.eye(7).expand(5, 7, 7) * 0.25)
    found = euclidean_measures(poses, SPACE)
    assert found == {"mean_on_axis": pytest.approx(-1.25), "mean_off_axis": pytest.approx(1.25), "deviation": 0.5}
    assert euclidean_measures(poses, Space(sphere=7)) == {"mean_on_axis": 0, "mean_off_axis": 0, "deviation": 0}


def test_a_variant_knows_its_stage_1_and_not_the_stages_that_it_replaces(small_model):
    def known():
        return facts("s7-r8", small_model, False)

    before = known()
    small_model.encoder.W.data.add_(1e-3)
    assert known() == before
    small_model.autoencoder.output_bias.data.add_(1e-3)
    assert known() != before


def test_the_shipped_results_are_those_of_the_spaces_settings_and_stage_1_that_the_experiment_has_now():
    shipped = checkpoints.read_json(Path(capsnb.__file__).parent / "results" / "product-capsules.json")["variants"]
    stage1 = load_pretrained(STAGE1)
    now = {name: facts(name, stage1, False) for name in VARIANTS}
    assert {name: {key: record[key] for key in now[name]} for name, record in shipped.items()} == now


# The whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The results file of a quick run of two variants."""
    out = tmp_path_factory.mktemp("results") / "product.json"
    with threadpool_limits(1, "blas"):
        main(["--quick", "--out", str(out), "--only", "s15", "s7-r8"])
    return out


def test_a_quick_run_writes_every_measure_and_says_that_it_was_quick(finished):
    content = json.loads(finished.read_text())
    assert content["quick"] is True and sorted(content["variants"]) == ["s15", "s7-r8"]
    for name, record in content["variants"].items():
        found = record["measures"]
        assert record["settings"] == asdict(settings_of(True)) and record["space"] == asdict(VARIANTS[name])
        assert 0 < found["variance_left"] < 1 and 0 < found["mean_direction"] < 1
        parts = ["direction", "activation", "all"] if name == "s15" else ["direction", "activation", "line", "all"]
        assert sorted(found["explained"]["area"]) == sorted(parts)
        assert all(len(ink) == STEPS for ink in found["ink"].values())
        for key in ("samples", "samples_without_activation"):
            assert all(0 <= domain["negative_share"] <= 1 for domain in found[key].values())


def test_the_pictures_are_samples_of_every_domain_and_sweeps(finished):
    found = checkpoints.read(finished.with_suffix(".safetensors"))[0]
    ends = ["prior", "complete", "restricted", "fitted", "circle"]
    assert sorted(found) == sorted([f"s15/{end}" for end in ends] + [f"s7-r8/{end}" for end in [*ends, "line"]])
    for name, images in found.items():
        assert images.shape == (STEPS if name.endswith(("circle", "line")) else 3, 20, 28, 28)
        assert images.dtype == torch.uint8 and images.float().std() > 1


def test_a_second_run_trains_nothing_but_another_space_or_stage_1_makes_it_train(finished, monkeypatch):
    monkeypatch.setattr(product_capsules, "train", None)
    main(["--quick", "--out", str(finished), "--only", "s7-r8"])
    model, results = load_pretrained(STAGE1), Results(finished, True, 0)
    assert results.holds("s15", **facts("s15", model, True))
    monkeypatch.setitem(VARIANTS, "s15", Space(sphere=16, variance=0.5))
    assert not results.holds("s15", **facts("s15", model, True))
    model.autoencoder.output_bias.data += 1
    assert not results.holds("s7-r8", **facts("s7-r8", model, True))
