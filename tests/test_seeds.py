"""The experiment on seeds: what it trains, clusters and sums up, and that the shipped seed is the shipped model."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import capsnb
from capsnb import checkpoints
from capsnb.settings import PRESETS
from experiments import seeds
from experiments.seeds import HEADLINE, SEEDS, main, principal_poses, subspaces_purity, summary, trained

PACKAGE = Path(capsnb.__file__).parent


def lines(rng, count):
    """Unit vectors near one of three lines through zero, on both sides of it, with the number of the line."""
    which = torch.randint(3, (count,), generator=rng)
    side = torch.randint(2, (count, 1), generator=rng) * 2.0 - 1
    return side * torch.eye(3, 7)[which] + 0.05 * torch.randn(count, 7, generator=rng), which


def test_subspaces_find_lines_through_zero_whatever_the_side(rng):
    (train, _), (test, truth) = lines(rng, 503), lines(rng, 211)
    assert subspaces_purity(train, test, truth, clusters=3, dim=1, seed=0) == 1.0
    shuffled = truth[torch.randperm(211, generator=rng)]
    assert subspaces_purity(train, test, shuffled, clusters=3, dim=1, seed=0) < 0.6


def test_principal_poses_stand_at_the_winner_and_lie_in_the_subspace_of_what_it_wins(rng):
    basis = torch.linalg.qr(torch.randn(2, 23, 3, generator=rng)).Q  # of two capsules: 3 dimensions of 23
    won, won_test = torch.randint(2, (101,), generator=rng), torch.randint(2, (53,), generator=rng)
    inside = [torch.einsum("nd,ncd->nc", torch.randn(len(of), 3, generator=rng), basis[of]) for of in (won, won_test)]
    train, test = principal_poses(*inside, (won, won_test), 3, 3)
    assert torch.equal(test.norm(dim=2) > 0.5, torch.nn.functional.one_hot(won_test, 3).bool())
    assert_close(test.sum(1).norm(dim=1), torch.ones(53))  # nothing of them is lost
    alike = torch.nn.functional.normalize(inside[1][won_test == 1], dim=1)
    assert_close(test[won_test == 1, 1] @ test[won_test == 1, 1].T, alike @ alike.T)  # nor are they bent
    assert train.shape == (101, 3, 3)


def test_the_summary_is_numpys_mean_and_spread_over_the_seeds():
    purities = [0.5, 0.9, 0.7]
    records = {
        f"mnist-{seed}": {"measures": dict.fromkeys(HEADLINE, 1.0) | {"purity": purity, "quality": {"fid": 3.0 + seed}}}
        for seed, purity in enumerate(purities)
    }
    found = summary(records)
    assert list(found) == list(HEADLINE)
    assert found["purity"] == pytest.approx({"mean": 0.7, "spread": np.std(purities, ddof=1)})
    assert found["fid"] == {"mean": 4.0, "spread": 1.0} and found["recall"] == {"mean": 1.0, "spread": 0.0}
    assert summary({"mnist-1": records["mnist-1"]}) == {}


def test_seed_0_is_the_shipped_model_and_is_not_trained(monkeypatch, small_model, tmp_path):
    monkeypatch.setattr(seeds, "load_pretrained", {"mnist": small_model}.get)
    assert trained("mnist-0", torch.zeros(0, 1, 28, 28), tmp_path, False) is small_model
    assert not list(tmp_path.iterdir())


def test_a_quick_run_trains_with_its_seed_rounds_to_16_bits_and_is_kept(small_settings, monkeypatch, tmp_path, capsys):
    small = small_settings()
    start = replace(small.encoder.start, groups=101, components=23, tries=1)
    small = replace(small, encoder=replace(small.encoder, start=start, batch=28))
    monkeypatch.setattr(seeds, "quick", lambda settings: small)
    arguments = ["--quick", "--only", "mnist-1", "mnist-2", "--out", str(tmp_path / "seeds.json")]
    main(arguments)
    printed = capsys.readouterr().out
    content = checkpoints.read_json(tmp_path / "seeds.json")
    assert list(content["runs"]) == ["mnist-1", "mnist-2"] and content["quick"] is True
    one, other = (content["runs"][name]["measures"] for name in ("mnist-1", "mnist-2"))
    assert one["reconstruction_mse"] != other["reconstruction_mse"]
    assert {"purity", "svm_probe", "subspaces_purity", "quality"} <= set(one)
    assert content["summary"]["purity"]["mean"] == pytest.approx((one["purity"] + other["purity"]) / 2)
    folder = tmp_path / "seeds.runs" / "mnist-1"
    assert checkpoints.read(folder / "model.safetensors")[1]["seed"] == 1
    model = trained("mnist-1", torch.zeros(1000, 1, 28, 28), tmp_path / "seeds.runs", True)  # finished: only read
    assert all(torch.equal(value, value.half().float()) for value in model.state_dict().values())

    monkeypatch.setattr(seeds, "trained", lambda *_: pytest.fail("a finished run was trained again"))
    main(arguments)
    assert capsys.readouterr().out == printed


def test_the_shipped_results_are_of_the_preset_and_seed_0_is_the_shipped_model():
    content = checkpoints.read_json(PACKAGE / "results" / "seeds.json")
    assert content["quick"] is False and list(content["runs"]) == list(SEEDS)
    assert all(record["settings"] == asdict(PRESETS["sparse"]) for record in content["runs"].values())
    shipped = checkpoints.read_json(PACKAGE / "weights" / "mnist.evaluation.json")["measures"]
    assert content["runs"]["mnist-0"]["measures"]["purity"] == pytest.approx(shipped["purity"], abs=1e-3)
    assert content["summary"] == summary(content["runs"])
