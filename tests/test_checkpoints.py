"""Files of weights and of JSON: all or nothing, and clear about what is wrong with them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from capsnb import checkpoints


@pytest.fixture
def path(tmp_path):
    """A weight file in a folder that does not exist before."""
    path = tmp_path / "new" / "folder" / "weights.safetensors"
    checkpoints.write(path, {"a": torch.arange(7.0), "b": torch.ones(2, 3)}, seed=5, settings={"rate": 0.25})
    return path


def test_tensors_and_facts_come_back_as_they_were(path):
    tensors, facts = checkpoints.read(path)
    assert_close(tensors, {"a": torch.arange(7.0), "b": torch.ones(2, 3)}, rtol=0, atol=0)
    assert facts == {"seed": 5, "settings": {"rate": 0.25}}


def test_parameters_and_tensors_laid_out_otherwise_can_be_written(tmp_path):
    weights = torch.nn.Parameter(torch.randn(2, 3, 5, 7)).to(memory_format=torch.channels_last)
    checkpoints.write(tmp_path / "w", {"weights": weights, "turned": torch.ones(2, 3).T})
    assert_close(checkpoints.read(tmp_path / "w")[0]["weights"], weights.detach(), rtol=0, atol=0)


def test_no_partial_file_stays_behind(path):
    assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]


def test_a_crash_while_writing_leaves_the_file_before_it_whole(path, monkeypatch):
    before = path.read_bytes()

    def crash(tensors, target, facts):
        target.write_bytes(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_file", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write(path, {"a": torch.zeros(7)})
    assert path.read_bytes() == before


def test_a_crash_while_writing_json_leaves_the_file_before_it_whole(tmp_path):
    path = tmp_path / "metrics.json"
    checkpoints.write_json(path, {"loss": [1, 2]})
    with pytest.raises(TypeError):
        checkpoints.write_json(path, {"loss": object()})
    assert checkpoints.read_json(path) == {"loss": [1, 2]}


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.safetensors does not exist; train it with `python -m capsnb"):
        checkpoints.read(tmp_path / "missing.safetensors")


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoints.read(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "cut short", "header only", "text", "another format"])
def test_a_damaged_or_foreign_file_says_what_to_do_and_is_left_alone(damage, path):
    content = path.read_bytes()
    damaged = {
        "empty": b"",
        "cut short": content[:-1],
        "header only": content[:20],
        "text": b"these are no weights",
        "another format": b"PK\x03\x04" + bytes(100),
    }[damage]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="weights.safetensors is not a complete capsnb weight file .*; delete it"):
        checkpoints.read(path)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"capsnb": "{not json"}])
def test_weights_of_another_program_are_refused(metadata, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors", metadata)
    with pytest.raises(ValueError, match="foreign.safetensors is not a complete capsnb weight file"):
        checkpoints.read(tmp_path / "foreign.safetensors")


def test_json_comes_back_as_it_was_and_is_readable(tmp_path):
    content = {"seed": 5, "stages": {"1": {"loss": [0.5, 0.25]}}}
    checkpoints.write_json(tmp_path / "new" / "metrics.json", content)
    assert checkpoints.read_json(tmp_path / "new" / "metrics.json") == content
    assert len((tmp_path / "new" / "metrics.json").read_text().splitlines()) > 3


def test_damaged_json_says_what_to_do(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"seed": 5})[:-1])
    with pytest.raises(ValueError, match="metrics.json is not complete JSON .*; make it again"):
        checkpoints.read_json(tmp_path / "metrics.json")


OPTIMISERS = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, 0.1, weight_decay=0.01),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9),
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.01),
}


def descend(optimiser, parameters, steps):
    for step in range(steps):
        optimiser.zero_grad()
        sum((step + 1) * (parameter - 1).pow(4).sum() for parameter in parameters).backward()
        optimiser.step()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_goes_on_from_its_packed_state_as_if_nothing_had_happened(name, tmp_path):
    first = [torch.nn.Parameter(torch.linspace(-1, 2, 7)), torch.nn.Parameter(torch.zeros(2, 3))]
    optimiser = OPTIMISERS[name](first)
    descend(optimiser, first, 5)
    checkpoints.write(tmp_path / "state", checkpoints.pack_optimiser(optimiser))
    second = [torch.nn.Parameter(parameter.detach().clone()) for parameter in first]
    again = OPTIMISERS[name](second)
    checkpoints.unpack_optimiser(again, checkpoints.read(tmp_path / "state")[0] | {"W": torch.ones(2)})
    descend(optimiser, first, 5), descend(again, second, 5)
    for one, other in zip(first, second):
        assert_close(one, other, rtol=0, atol=0)
