"""Weight files of whole models, and the ones that ship with capsnb."""

from dataclasses import asdict

import pytest
import torch
from torch.testing import assert_close

from capsnb import checkpoints, data, load_pretrained
from capsnb.evaluation import winner_measures
from capsnb.pretrained import NAMES, WEIGHTS, load_model, save_model

OF_THE_ISSUE = ("mnist", "fashion-mnist", "mnist-paper", "mnist-dense")


def test_a_model_comes_back_from_its_file_with_its_settings(small_model, digits, tmp_path):
    save_model(small_model, tmp_path / "model.safetensors", dataset="mnist")
    again = load_model(str(tmp_path / "model.safetensors"))
    assert again.settings == small_model.settings and not again.training
    assert_close(dict(again.state_dict()), dict(small_model.state_dict()), rtol=0, atol=0)
    assert torch.equal(again.encode(digits[0][:5]), small_model.encode(digits[0][:5]))
    assert checkpoints.read(tmp_path / "model.safetensors")[1]["dataset"] == "mnist"


def test_half_precision_halves_the_file_and_is_read_back_as_single(small_model, digits, tmp_path):
    save_model(small_model, tmp_path / "full.safetensors")
    save_model(small_model, tmp_path / "half.safetensors", dtype=torch.float16)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]
    again = load_model(tmp_path / "half.safetensors")
    assert {value.dtype for value in again.state_dict().values()} == {torch.float32}
    assert_close(again.reconstruct(digits[0][:5]), small_model.reconstruct(digits[0][:5]), rtol=0, atol=2e-2)


def test_stage_1_can_be_shared_with_another_file_of_the_folder(small_model, tmp_path):
    save_model(small_model, tmp_path / "whole.safetensors")
    save_model(small_model, tmp_path / "rest.safetensors", autoencoder="whole.safetensors")
    assert not any(name.startswith("autoencoder.") for name in checkpoints.read(tmp_path / "rest.safetensors")[0])
    again = load_model(tmp_path / "rest.safetensors")
    assert_close(dict(again.state_dict()), dict(small_model.state_dict()), rtol=0, atol=0)
    (tmp_path / "whole.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="whole.safetensors does not exist"):
        load_model(tmp_path / "rest.safetensors")


def test_a_stage_1_that_is_not_the_same_cannot_be_shared(small_model, tmp_path):
    save_model(small_model, tmp_path / "whole.safetensors")
    with torch.no_grad():
        small_model.autoencoder.filters2.mul_(1.5)
    with pytest.raises(ValueError, match="whole.safetensors holds another stage 1"):
        save_model(small_model, tmp_path / "rest.safetensors", autoencoder="whole.safetensors")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown pretrained model 'minst'; choose one of 'mnist', 'fashion-mnist', "):
        load_pretrained("minst")


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="train it with `python -m capsnb train`"):
        load_model(tmp_path / "model.safetensors")


def test_a_checkpoint_of_one_stage_is_not_taken_for_a_model(small_model, tmp_path):
    part = small_model.encoder
    checkpoints.write(tmp_path / "stage2.safetensors", part.state_dict(), settings=asdict(part.settings), seed=0)
    with pytest.raises(ValueError, match="stage2.safetensors is not a whole model"):
        load_model(tmp_path / "stage2.safetensors")


@pytest.mark.parametrize("damage", ["a tensor missing", "a tensor of another size", "unknown settings", "no settings"])
def test_a_file_that_does_not_fit_the_model_is_refused(damage, small_model, tmp_path):
    path = tmp_path / "model.safetensors"
    tensors, facts = dict(small_model.state_dict()), {"settings": asdict(small_model.settings)}
    if damage == "a tensor missing":
        del tensors["decoder.U"]
    elif damage == "a tensor of another size":
        tensors["decoder.U"] = torch.zeros(2, 3)
    elif damage == "unknown settings":
        facts["settings"]["encoder"]["colour"] = "blue"
    else:
        facts = {}
    checkpoints.write(path, tensors, **facts)
    with pytest.raises(ValueError, match="model.safetensors is not a whole model .*python -m capsnb train"):
        load_model(path)


# The weights that ship


@pytest.fixture(scope="module")
def shipped():
    """Every shipped model is read once."""
    loaded = {}
    return lambda name: loaded.setdefault(name, load_pretrained(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_has_the_sizes_of_the_book_and_finite_numbers(name, shipped):
    images, _ = data.load("fashion-mnist" if name.startswith("fashion") else "mnist", "test", sample=True)
    model = shipped(name)
    capsules = model.encode(images[:31])
    assert capsules.shape == (31, 20, 16) and torch.linalg.vector_norm(capsules, dim=2).max() < 1
    pictures = model.decode(capsules)
    assert pictures.shape == (31, 1, 28, 28) and pictures.min() >= 0 and pictures.max() <= 1
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert torch.equal(model.reconstruct(images[:31]), pictures)


@pytest.mark.parametrize("name", OF_THE_ISSUE)
def test_the_settings_of_a_shipped_model_are_those_of_its_name(name, shipped):
    preset = name.removeprefix("fashion-").removeprefix("mnist").removeprefix("-") or "sparse"
    assert shipped(name).settings.preset == preset
    facts = checkpoints.read(WEIGHTS / f"{name}.safetensors")[1]
    assert facts["dataset"] == ("fashion-mnist" if name.startswith("fashion") else "mnist")
    assert facts["images"] == 60_000 and facts["quick"] is False


def test_the_four_models_of_the_table_ship_in_at_most_30_megabytes_of_half_precision():
    paths = [WEIGHTS / f"{name}.safetensors" for name in OF_THE_ISSUE]
    assert sum(path.stat().st_size for path in paths) <= 30e6
    for path in paths:
        assert {tensor.dtype for tensor in checkpoints.read(path)[0].values()} == {torch.float16}


def test_the_default_model_reconstructs_digits_within_the_bound(shipped):
    images, _ = data.load("mnist", "test", sample=True)
    assert (shipped("mnist").reconstruct(images) - images).square().mean() <= 0.03


@pytest.mark.parametrize("name, least", [("mnist", 0.86), ("fashion-mnist", 0.66)])
def test_the_default_models_sort_the_sample_by_class(name, least, shipped):
    """The whole test set has 0.92 and 0.73; the sample of 1,000 scatters by some hundredths."""
    images, labels = data.load(name, "test", sample=True)
    measures = winner_measures(shipped(name).encode(images), labels)
    assert measures["purity"] >= least and measures["capsules_in_use"] >= 17


@pytest.mark.parametrize("name", NAMES)
def test_the_curves_and_measures_of_a_shipped_model_lie_beside_it(name):
    metrics = checkpoints.read_json(WEIGHTS / f"{name}.metrics.json")
    assert metrics["settings"] == checkpoints.read(WEIGHTS / f"{name}.safetensors")[1]["settings"]
    assert set(metrics["stages"]) == {"1", "2", "3"}
    for curve in metrics["stages"].values():
        assert len(curve["steps"]) == len(curve["loss"]) > 0 and curve["seconds"] > 0
    evaluation = checkpoints.read_json(WEIGHTS / f"{name}.evaluation.json")
    assert evaluation["measures"]["test_images"] == 10_000 and evaluation["measures"]["train_images"] == 60_000
