"""The benchmarks compare like with like, and run; nothing is asserted about time."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from benchmarks import speed, votes
from capsnb import checkpoints, route, squash
from capsnb.model import CapsuleEncoder
from capsnb.sparsity import explanation
from experiments.bases import BASES

B, I, J, D, E = 3, 7, 5, 11, 13  # noqa: E741


@pytest.fixture
def layer(double):
    return squash(double(B, I, E)), double(I, J, D, E)


def test_routing_over_stored_votes_is_sabours_routing_written_as_loops(layer):
    x, W = layer
    coupling, z = votes.route(x, W, rounds=3)
    for b in range(B):
        cast = torch.einsum("ijde,ie->ijd", W, x[b])
        logits = torch.zeros(I, J).double()
        for _ in range(2):
            sums = torch.einsum("ij,ijd->jd", logits.softmax(1), cast)
            logits += torch.einsum("ijd,jd->ij", cast, squash(sums))
        assert_close(coupling[b], logits.softmax(1))
        assert_close(z[b], torch.einsum("ij,ijd->jd", logits.softmax(1), cast))


def test_the_couplings_by_cosine_and_the_explanations_are_the_librarys(layer):
    x, W = layer
    stored = votes.votes_of(x, W)
    assert_close(votes.route_by_cosine(stored).transpose(1, 2), route(x, W).coupling)
    assert_close(votes.explanation(x, W, stored), explanation(x, W))


@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_the_update_over_votes_has_the_loss_and_the_gradient_of_the_librarys(name, layer):
    torch.manual_seed(3)
    ours = CapsuleEncoder(I, E, BASES[name]).double().train()
    theirs, x = copy.deepcopy(ours), layer[0]
    losses = ours(x), votes.stage2_loss(x, theirs.W, theirs.sparsity)
    for loss in losses:
        loss.backward()
    assert_close(losses[0], losses[1])
    assert_close(ours.W.grad, theirs.W.grad)


def test_the_quick_benchmark_prints_a_table_and_writes_every_measure(tmp_path):
    out, root = tmp_path / "speed.json", Path(__file__).parents[1]
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--device", "cpu", "--out", out]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    result = json.loads(out.read_text())
    assert result["quick"] and "update, sparse" in done.stdout and "GFLOP/s" in done.stdout
    rows = result["routing"] + result["updates"]
    assert all(row["ms"]["votes"] > 0 and row["ms"]["capsnb"] > 0 for row in rows)
    assert [row["batch"] for row in result["inference"]] == [1, 3]


def test_a_training_run_is_reported_from_its_own_files(tmp_path):
    stage = {"seconds": 5.0, "peak_memory_mb": 700, "steps": [1], "loss": [0.5]}
    metrics = {"dataset": "mine", "images": 31, "settings": {"preset": "dense"}, "stages": {"1": stage}}
    measures = {"purity": 0.3, "linear_probe": 0.7, "reconstruction_mse": 0.1, "effective_rank": 5.0}
    checkpoints.write_json(tmp_path / "metrics.json", metrics)
    checkpoints.write_json(tmp_path / "evaluation.json", {"measures": measures})
    assert speed.training(tmp_path) == {
        "dataset": "mine",
        "preset": "dense",
        "images": 31,
        "stages": {"1": {"seconds": 5.0, "peak_memory_mb": 700}},
        "measures": {"purity": 0.3, "linear_probe": 0.7, "reconstruction_mse": 0.1},
    }
