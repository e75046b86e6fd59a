"""The experiment on pairs of digits: what counts as read, what is measured and kept, and how a run goes on."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import capsnb
from capsnb import checkpoints
from capsnb.baselines import capsnet_pairs
from capsnb.baselines.capsnet import CapsNet
from capsnb.multi_mnist import Pairs
from experiments import multi_mnist
from experiments.multi_mnist import both_found, main, measure, pictures

PAIRS = capsnet_pairs.PAIRS
SMALL = replace(PAIRS, channels=3, types=2, primary_dim=3, dim=5, first_hidden=7, second_hidden=11)
RESULTS = Path(capsnb.__file__).parent / "results"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(capsnet_pairs, "PAIRS", SMALL)
    monkeypatch.setattr(multi_mnist, "load_capsnet", lambda: CapsNet(replace(SMALL, size=28)))
    monkeypatch.setattr(multi_mnist, "fingerprint", lambda name: f"of {name}")


def test_a_pair_is_read_if_its_two_classes_come_first_in_either_order():
    found = torch.tensor([[3, 5, 1], [5, 3, 1], [3, 1, 5], [1, 3, 5], [3, 4, 5], [0, 1, 3]])
    labels = torch.tensor([[3, 5]] * 6)
    assert both_found(found, labels).tolist() == [True, True, False, False, False, False]
    assert both_found(found, labels.flip(1)).tolist() == [True, True, False, False, False, False]


class Told:
    """A network that draws every class as a plane of its number's tenth."""

    def reconstruct_each(self, capsules, classes):
        return (classes / 10)[:, :, None, None, None].expand(-1, -1, 1, 3, 7)


def pairs_of(labels, rng):
    digits = torch.rand(len(labels), 2, 1, 3, 7, generator=rng)
    return Pairs(digits.sum(1).clamp(max=1), digits, labels)


def test_the_measures_are_the_share_read_wrongly_and_mean_squared_errors_of_single_digits(rng):
    labels = torch.tensor([[3, 5], [2, 7], [9, 0], [4, 1], [1, 8]])
    capsules = torch.zeros(5, 10, 1)
    for image, order in enumerate([(3, 5), (7, 2), (9, 4), (2, 3), (8, 1)]):  # the third and fourth are wrong
        capsules[image, order, 0] = torch.tensor([0.9, 0.8])
    pairs, totals = pairs_of(labels, rng), [0.0, 0.0, 0.0]
    for image in range(5):
        for place in range(2):
            for pixel in range(21):
                digit = pairs.digits[image, place].flatten()[pixel].item()
                guesses = labels[image, place].item() / 10, pairs.images[image].flatten()[pixel].item(), 0.0
                totals = [total + (digit - guess) ** 2 / 10 for total, guess in zip(totals, guesses)]
    found = measure(Told(), pairs, capsules)
    assert (found["pairs"], found["wrong"], found["error"]) == (5, 2, 0.4)
    assert [found[name] for name in ("squared_error", "of_the_image", "of_nothing")] == pytest.approx(totals, rel=1e-5)


def test_the_pictures_are_the_first_pairs_read_rightly_and_then_the_first_read_wrongly(rng, monkeypatch):
    monkeypatch.setattr(multi_mnist, "RIGHT", 3)
    monkeypatch.setattr(multi_mnist, "WRONG", 2)
    right = [False, True, True, False, True, True, False]
    labels, capsules = torch.tensor([[1, 6], [2, 7], [9, 0], [4, 1], [1, 8], [3, 8], [2, 5]]), torch.zeros(7, 10, 1)
    for image, (first, second) in enumerate(labels.tolist()):
        other = next(c for c in range(10) if c not in (first, second))
        capsules[image, second], capsules[image, first], capsules[image, other] = 0.9, 0.8, 0.7 if right[image] else 1
    pairs = pairs_of(labels, rng)
    found, rows = pictures(Told(), pairs, capsules), [1, 2, 4, 0, 3]
    assert found["labels"].tolist() == labels[rows].tolist()
    assert found["found"].tolist() == [[7, 2, 0], [0, 9, 1], [8, 1, 0], [0, 6, 1], [0, 1, 4]]
    for name, part in (("images", pairs.images[:, 0]), ("digits", pairs.digits[:, :, 0])):
        assert_close(found[name] / 255, part[rows], atol=0.51 / 255, rtol=0)
    for name, classes in (("of_labels", found["labels"]), ("of_found", found["found"])):
        assert_close(found[name], (255 * (classes.float() / 10)).round().byte()[:, :, None, None].expand(-1, -1, 3, 7))


def test_a_quick_run_writes_the_measures_and_the_pictures_and_leaves_nothing_else(small, tmp_path):
    out = tmp_path / "pairs.json"
    main(["--quick", "--seed", "3", "--out", str(out)])
    content, tensors = checkpoints.read_json(out), checkpoints.read(out.with_suffix(".safetensors"))[0]
    assert content["quick"] is True and content["seed"] == 3 and content["start"] == "of capsnet-mnist"
    assert content["settings"] == asdict(replace(SMALL, epochs=0.2))
    assert content["test"]["pairs"] == 500 and "torch" in content["versions"]
    shown = len(tensors["images"])
    assert 0 < shown <= 16 and tensors["digits"].shape == tensors["of_labels"].shape == (shown, 2, 36, 36)
    assert tensors["of_found"].shape == (shown, 3, 36, 36)
    assert {part.dtype for part in tensors.values()} == {torch.uint8}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.json", "pairs.safetensors"]


def test_an_interrupted_run_goes_on_to_the_same_end_and_until_then_leaves_finished_files_alone(
    small, tmp_path, monkeypatch
):
    monkeypatch.setattr("capsnb.training._SECONDS_BETWEEN_CHECKPOINTS", -1)
    whole, parts, follow = tmp_path / "whole.json", tmp_path / "parts.json", multi_mnist.follow
    main(["--quick", "--out", str(whole)])
    parts.write_text("what was there")

    def stopping(updates, *rest):
        return follow((step for step in updates if step.step < 2 or 1 / 0), *rest)

    monkeypatch.setattr(multi_mnist, "follow", stopping)
    with pytest.raises(ZeroDivisionError):
        main(["--quick", "--out", str(parts)])
    assert parts.read_text() == "what was there" and (tmp_path / "parts.checkpoint.safetensors").exists()
    monkeypatch.setattr(multi_mnist, "follow", follow)
    main(["--quick", "--out", str(parts)])
    first, second = (checkpoints.read_json(path) for path in (whole, parts))
    assert first["test"] == second["test"]
    pictures = [checkpoints.read(path.with_suffix(".safetensors"))[0] for path in (whole, parts)]
    assert all(torch.equal(part, pictures[1][name]) for name, part in pictures[0].items())


def test_the_shipped_results_are_those_of_the_settings_that_the_experiment_has_now():
    shipped = checkpoints.read_json(RESULTS / "multi-mnist.json")
    assert type(PAIRS)(**shipped["settings"]) == PAIRS and shipped["quick"] is False and shipped["images"] == 60_000
    tensors, _ = checkpoints.read(RESULTS / "multi-mnist.safetensors")
    right = both_found(tensors["found"], tensors["labels"])
    assert right.sum() == multi_mnist.RIGHT and (~right).sum() == min(multi_mnist.WRONG, shipped["test"]["wrong"])
