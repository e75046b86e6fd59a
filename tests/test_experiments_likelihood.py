"""The experiment on likelihoods: its sets and summaries by hand, and a quick run from beginning to end."""

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from capsnb import checkpoints, squash
from capsnb.likelihood import Annealed
from experiments import likelihood
from experiments.likelihood import Results, crossed, describe, estimate, image_sets, main


def test_crossed_sets_keep_the_lengths_or_the_directions_of_x(rng):
    x = squash(torch.randn(211, 13, 3, generator=rng))
    sets = crossed(x, rng=rng)
    length = lambda x: torch.linalg.vector_norm(x, dim=2)  # noqa: E731
    assert_close(length(sets["lengths"]), length(x))
    assert_close(sets["lengths"] / length(x)[..., None], sets["uniform"] / length(sets["uniform"])[..., None])
    assert_close(length(sets["directions"]), length(sets["uniform"]))
    assert_close(sets["directions"] / length(sets["uniform"])[..., None], x / length(x)[..., None])
    assert_close((length(sets["uniform"]) ** 3).mean(), torch.tensor(0.5), rtol=0, atol=0.03)


def test_the_summary_counts_pairs_in_which_the_test_digit_is_higher(double):
    values = {"test": double(11), "other": double(7) + 1}
    found = describe(values)["other"]
    pairs = [digit > other for digit in values["test"].tolist() for other in values["other"].tolist()]
    assert found["test_higher"] == pytest.approx(np.mean(pairs)) and found["n"] == 7
    other = values["other"].numpy()
    assert found["mean"] == pytest.approx(other.mean())
    assert found["error"] == pytest.approx(other.std(ddof=1) / 7**0.5)


def test_on_the_way_down_the_weights_estimate_the_inverse():
    found = Annealed(torch.zeros(3, 1), torch.tensor([-7.0, -7.0, -7.0]))
    assert estimate(found, 5, 0.0)["log_z"] == pytest.approx(-7)
    assert estimate(found, 5, 0.0, down=True)["log_z"] == pytest.approx(7)


def test_permuted_digits_have_the_pixels_of_the_test_digits_all_in_one_other_order(rng):
    sets = image_sets(likelihood.QUICK, True, rng=rng)
    test, permuted = (sets[key].flatten(1) for key in ("test", "permuted"))
    assert {key: len(images) for key, images in sets.items()} == dict.fromkeys(sets, 50)
    assert_close(permuted.sort(1).values, test.sort(1).values)
    assert_close(permuted.sum(0).sort().values, test.sum(0).sort().values)  # sums of a pixel over all images
    assert (permuted != test).float().mean() > 0.2


# The whole run


@pytest.fixture
def small(monkeypatch, small_model):
    """The command judges a small model in the place of every shipped one."""
    monkeypatch.setattr(likelihood, "load_pretrained", lambda name: small_model)
    return small_model


@pytest.fixture
def out(small, tmp_path):
    """The results file of a quick run of a capsule model and the RBM."""
    main(["--quick", "--seed", "3", "--out", str(tmp_path / "found.json"), "--only", "mnist", "rbm"])
    return tmp_path / "found.json"


def test_a_quick_run_writes_estimates_and_the_log_density_of_every_set(out):
    content, arrays = json.loads(out.read_text()), checkpoints.read(out.with_suffix(".safetensors"))[0]
    assert content["quick"] is True and content["seed"] == 3 and sorted(content["entries"]) == ["mnist", "rbm"]
    sets = {"mnist": "fashion directions lengths model permuted test train uniform", "rbm": "fashion permuted test"}
    for name, entry in content["entries"].items():
        assert np.isfinite([found["log_z"] for found in [*entry["log_z"]["up"], entry["log_z"]["down"]]]).all()
        for key in sets[name].split():
            assert arrays[f"{name}/{key}"].double().mean().item() == pytest.approx(
                entry["log_density"][key]["mean"], rel=2e-3, abs=2e-3
            )
    assert arrays["mnist/pictures"].dtype == torch.uint8 and arrays["mnist/pictures"].shape[1:] == (28, 28)


def test_the_log_density_is_the_free_energy_less_the_longest_ladder_s_log_z(out, small):
    entry = json.loads(out.read_text())["entries"]["mnist"]
    x = small.lower_capsules(image_sets(likelihood.QUICK, True, rng=torch.Generator())["test"])
    expected = -likelihood.rerouted(small.encoder)(x).mean().item() - entry["log_z"]["up"][-1]["log_z"]
    assert entry["log_density"]["test"]["mean"] == pytest.approx(expected, rel=1e-4)
    assert entry["frozen"]["test"]["n"] == 50 and "exact" in entry["one_expert"]


def test_a_second_run_keeps_what_is_finished_unless_the_weights_have_changed(out, small, capsys):
    before = json.loads(out.read_text())["entries"]
    again = ["--quick", "--seed", "3", "--out", str(out), "--only", "mnist", "rbm"]
    capsys.readouterr()
    main(again)
    assert capsys.readouterr().out == "mnist: kept\nrbm: kept\n"
    assert json.loads(out.read_text())["entries"] == before
    with torch.no_grad():
        small.encoder.W.mul_(2)
    assert not Results(out, True, 3).holds("mnist")
    main(again)
    after = json.loads(out.read_text())["entries"]
    assert after["rbm"] == before["rbm"] and after["mnist"]["weights"] != before["mnist"]["weights"]
    assert Results(out, True, 3).holds("mnist")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "mnist", "mnits"], "invalid choice: 'mnits' (choose from"),
        (["--quick", "--seed", "4"], "was made with seed 3, not 4; choose another --out"),
        (["--seed", "3"], "was made with quick True, not False; choose another --out"),
    ],
)
def test_unknown_entries_and_results_of_another_run_are_refused(arguments, message, tmp_path, capsys):
    checkpoints.write_json(tmp_path / "found.json", {"quick": True, "seed": 3, "entries": {}})
    with pytest.raises(SystemExit):
        main([*arguments, "--out", str(tmp_path / "found.json")])
    assert message in capsys.readouterr().err
