"""Two processes that torchrun started train as one does: the same gradients, the same models, one set of files."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from torch.testing import assert_close

import capsnb
from capsnb import checkpoints, data, distributed
from capsnb.__main__ import main
from capsnb.pretrained import load_model

HOME = Path(capsnb.__file__).parents[1]
PATIENCE = 300  # seconds
KINDS = tuple(ranks.modules())
every_kind = pytest.mark.parametrize("kind", KINDS)


def torchrun(*arguments):
    """Two processes, of one thread each, that run a program; its outputs are read as text."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOME)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *map(str, arguments)], cwd=HOME, env=environment, text=True, **pipes)


def finish(process):
    """The outputs of a program that must end well."""
    try:
        output, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.terminate()  # torchrun ends its processes with it
    assert process.returncode == 0, errors
    return output, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder):
    """What each of two processes found."""
    finish(torchrun(ranks.__file__, folder))
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What this one process finds."""
    return ranks.results(tmp_path_factory.mktemp("one"))


# The same numbers


def test_each_process_takes_its_part_of_the_rows_of_one(one, two):
    assert two[0]["part"].tolist() + two[1]["part"].tolist() == one["part"].tolist() == list(range(2 * ranks.PART))
    assert len(two[0]["part"]) == ranks.PART


@every_kind
def test_the_gradient_is_that_of_one_process_with_the_joined_batch(kind, one, two):
    for found in two:
        assert_close(found["gradients"][kind], one["gradients"][kind])
    assert max(gradient.abs().max() for gradient in one["gradients"][kind].values()) > 1e-3


@every_kind
def test_training_ends_with_the_weights_of_one_process_and_alike_in_both(kind, one, two):
    assert_close(two[0]["trained"][kind], two[1]["trained"][kind], rtol=0, atol=0)
    assert_close(two[0]["trained"][kind], one["trained"][kind], rtol=1e-4, atol=1e-6)


def test_winning_shares_and_boosts_are_those_of_the_joined_batch_and_alike_in_both(one, two):
    for name in ("sparsity.share", "sparsity.boost", "sparsity.updates"):
        values = [found["trained"]["sparse encoder"][name] for found in (*two, one)]
        assert_close(values[0], values[1], rtol=0, atol=0)
        assert_close(values[0], values[2])
    assert one["trained"]["sparse encoder"]["sparsity.boost"].unique().numel() > 2


def test_no_two_processes_share_their_dropout(two):
    pairs = list(zip(*(found["losses with dropout"] for found in two)))
    assert len(pairs) == 9 and all(first != second for first, second in pairs)


# Files


def test_a_stage_goes_on_from_what_rank_0_alone_had_saved(two):
    for rank, found in enumerate(two):
        interrupted = found["interrupted"]
        assert interrupted.pop("steps") == list(range(5, 13))
        assert interrupted.pop("saved") == (rank == 0)
        whole = {name: value for name, value in found["trained"]["sparse encoder"].items() if name != "losses"}
        assert_close(interrupted, whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["at one go", "stage by stage"])
def test_a_run_leaves_the_files_and_the_model_of_one_process_in_the_folder_of_rank_0_alone(name, folder, one, two):
    assert [path.name for path in (folder / name).iterdir()] == ["0"]
    stages = [f"stage{stage}.safetensors" for stage in (1, 2, 3)]
    files = sorted(path.name for path in (folder / name / "0").iterdir())
    assert files == ["metrics.json", "model.safetensors", *stages]
    written = dict(load_model(folder / name / "0" / "model.safetensors").state_dict())
    for found in two:
        assert_close(found["runs"][name], written, rtol=0, atol=0)
    assert_close(written, one["runs"][name], rtol=1e-3, atol=1e-5)
    assert_close(written, two[0]["runs"]["at one go"], rtol=0, atol=0)


def test_the_command_line_under_torchrun_goes_on_after_it_was_killed_between_stages(write_folder, tmp_path):
    images, labels = data.load("mnist", "train", sample=True)
    split = (images[:22, 0] * 255).round().to(torch.uint8), labels[:22].to(torch.uint8)
    write_folder(tmp_path / "mine", {"train": split})
    out = tmp_path / "run"
    command = ["-m", "capsnb", "train", "--dataset", tmp_path / "mine", "--quick", "--device", "cpu", "--out", out]
    process, deadline = torchrun(*command), time.monotonic() + PATIENCE
    while not is_finished(out / "stage1.safetensors") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=PATIENCE)
    assert is_finished(out / "stage1.safetensors") and not is_finished(out / "stage2.safetensors"), errors
    before = (out / "stage1.safetensors").read_bytes()
    output, errors = finish(torchrun(*command, "--resume"))
    assert output.count("holds stage all of sparse: 22 images") == 1
    assert "stage 1: " not in errors and errors.count("stage 2: encoder:   0%") == 1
    assert (out / "stage1.safetensors").read_bytes() == before
    curves = checkpoints.read_json(out / "metrics.json")["stages"]
    assert [curve["steps"][-1] for curve in curves.values()] == [1, 40, 1]
    assert load_model(out / "model.safetensors").poses.mean.abs().max() > 0


def is_finished(path):
    return path.exists() and checkpoints.read_facts(path).get("finished", False)


# The environment


def test_every_process_takes_the_gpu_of_its_own_number_on_its_machine(monkeypatch):
    assert distributed.own_device("cuda") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert [distributed.own_device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:2", "cuda:1", "cpu"]


def test_half_of_torchruns_environment_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["train", "--dataset", "mnist", "--quick", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(arguments) == 2
    assert "environment variable RANK expected, but not set" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# What is refused, in both processes alike


@pytest.mark.parametrize(
    "cause, message",
    [
        ("batch", "a batch of 17 images cannot be shared equally among 2 processes; start a number of processes"),
        ("seed", r"seed differs between processes: \[0, 1\]; start all with the same options"),
        ("rows", r"rows differs between processes: \[101, 100\]"),
        ("stages", r"stages differs between processes: \[\(1,\), \(2,\)\]"),
        ("loss", "the loss is nan at step 1; lower the learning rate and resume"),
        ("missing stage", "has no finished stage 1; run it with --stage 1"),
        ("held folder", "at one go/0 holds stage 1 already; add --resume to go on, or change --out"),
        ("device", "unknown device for several processes 'meta'; choose one of 'cpu', 'cuda'"),
    ],
)
def test_an_error_stops_both_processes_with_the_same_message(cause, message, two):
    first, second = (found["messages"][cause] for found in two)
    assert re.search(message, first) and re.search(message, second)

