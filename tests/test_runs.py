"""Whole training runs in a folder, and the command line."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pretend
import pytest
import torch
from torch.testing import assert_close

import capsnb
from capsnb import checkpoints, data, runs, settings, training
from capsnb.__main__ import main
from capsnb.capsules import squash, to_capsules
from capsnb.model import ExpertCapsules
from capsnb.pretrained import load_model

PARTS = {1: "autoencoder", 2: "encoder", 3: "decoder"}


@pytest.fixture
def small_presets(monkeypatch, small_settings):
    """The presets of the command line, for small models."""
    for name in list(settings.PRESETS):
        monkeypatch.setitem(settings.PRESETS, name, small_settings(name))


@pytest.fixture
def train(small_presets, folder):
    """Train a small model with the command line; the arguments are those after --dataset and --quick."""
    return lambda *arguments: main(
        ["train", "--dataset", str(folder), "--quick", "--device", "cpu", *(str(argument) for argument in arguments)]
    )


def tensors(path):
    return checkpoints.read(path)[0]


def contents(path):
    """The bytes of every file of a folder."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def assert_same_model(one, other):
    assert_close(tensors(one / "model.safetensors"), tensors(other / "model.safetensors"), rtol=0, atol=0)


# A run and its folder


@pytest.mark.parametrize("preset", ["dense", "paper"])
def test_a_preset_runs_from_images_to_a_model_at_full_size(preset, folder, tmp_path):
    """The third one, sparse, does so in the test that kills a run."""
    out = tmp_path / "run"
    assert main(["train", "--dataset", str(folder), "--preset", preset, "--quick", "--out", str(out)]) == 0
    model = load_model(out / "model.safetensors")
    assert model.settings == settings.quick(settings.PRESETS[preset])
    images, _ = data.load(str(folder), "test")
    pictures = model.reconstruct(images)
    assert pictures.isfinite().all() and pictures.std(0).max() > 0


@pytest.mark.parametrize("preset", settings.PRESETS)
def test_a_run_leaves_its_checkpoints_its_model_and_its_metrics(preset, train, folder, tmp_path, capsys):
    assert train("--preset", preset, "--out", tmp_path / "run", "--seed", 5) == 0
    assert "holds stage all of " + preset in capsys.readouterr().out
    stages = [f"stage{stage}.safetensors" for stage in PARTS]
    assert sorted(contents(tmp_path / "run")) == ["metrics.json", "model.safetensors", *stages]
    metrics = checkpoints.read_json(tmp_path / "run" / "metrics.json")
    assert (metrics["dataset"], metrics["images"], metrics["seed"], metrics["quick"]) == (str(folder), 101, 5, True)
    assert settings.from_dict(metrics["settings"]) == settings.quick(settings.PRESETS[preset])
    versions = {"capsnb": capsnb.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    assert metrics["versions"] == versions
    for stage, last in (("1", 13), ("2", 40), ("3", 1 if preset == "sparse" else 40)):
        curve = metrics["stages"][stage]
        assert curve["steps"] == [*range(10, last, 10), last]
        assert len(curve["loss"]) == len(curve["steps"]) and curve["seconds"] >= 0
    model, facts = tensors(tmp_path / "run" / "model.safetensors"), checkpoints.read(tmp_path / "run" / stages[1])[1]
    assert facts["finished"] is True
    for stage, part in PARTS.items():
        for name, tensor in tensors(tmp_path / "run" / f"stage{stage}.safetensors").items():
            assert torch.equal(model[f"{part}.{name}"], tensor)


def test_the_poses_of_the_model_are_those_of_its_training_images(train, folder, tmp_path):
    train("--out", tmp_path / "run")
    model = load_model(tmp_path / "run" / "model.safetensors")
    found = {name: value.clone() for name, value in model.poses.state_dict().items()}
    images = data.load(str(folder), "train")[0]
    model.poses.fit(runs.Encoded(model, images).upper)
    assert_close(dict(model.poses.state_dict()), found, rtol=1e-4, atol=1e-5)
    assert_close(found["share"].sum(), torch.tensor(1.0))


def test_a_point_of_a_curve_is_the_mean_loss_of_its_ten_updates(small_presets, tmp_path, monkeypatch):
    def fake(module, images, **options):
        for step in range(1, 26):
            yield training.Step(step, 25, float(step**2), 0.1)

    monkeypatch.setattr(training, "train_autoencoder", fake)
    run = runs.Run(settings.PRESETS["dense"], "mine", tmp_path)
    runs.train(run, torch.zeros(7, 1, 28, 28), stages=(1,))
    curve = checkpoints.read_json(tmp_path / "metrics.json")["stages"]["1"]
    squares = [step**2 for step in range(1, 26)]
    assert curve["steps"] == [10, 20, 25]
    assert curve["loss"] == [sum(squares[:10]) / 10, sum(squares[10:20]) / 10, sum(squares[20:]) / 5]


def test_the_inputs_of_stages_2_and_3_are_the_capsules_of_the_models_own_methods(small_model, digits):
    images = digits[0][:509]
    encoded, rows = runs.Encoded(small_model, images), torch.tensor([3, 508, 11])
    with torch.no_grad():
        features = small_model.autoencoder.features(images)
    scale = small_model.settings.encoder.input_scale
    assert len(encoded) == 509 and encoded[rows].dtype == torch.float32
    assert_close(encoded[rows], scale * to_capsules(features, 3)[rows], rtol=0.03, atol=0.03)
    assert_close(encoded.upper, small_model.encoder.encode(squash(encoded[torch.arange(509)])).detach())


def test_no_more_lower_capsules_are_held_than_were_asked_for(small_model, digits, monkeypatch):
    asked, encode = [], small_model.lower_preactivations
    monkeypatch.setattr(small_model, "lower_preactivations", lambda images: asked.append(len(images)) or encode(images))
    encoded = runs.Encoded(small_model, digits[0][:1000].repeat(2, 1, 1, 1))
    encoded[torch.tensor([3, 5, 7])]
    assert len(encoded.upper) == 2000 and len(encoded.upper) == 2000
    assert asked == [3, 500, 500, 500, 500]


def test_every_stage_reports_its_peak_memory(train, tmp_path):
    train("--out", tmp_path / "run")
    stages = checkpoints.read_json(tmp_path / "run" / "metrics.json")["stages"]
    peaks = [stages[stage]["peak_memory_mb"] for stage in "123"]
    assert peaks == sorted(peaks) and 50 < peaks[0] <= runs.peak_memory()


def test_the_bias_free_reading_is_an_option(train, tmp_path):
    assert train("--autoencoder", "bias-free", "--stage", 1, "--out", tmp_path / "run") == 0
    found = tensors(tmp_path / "run" / "stage1.safetensors")
    assert not any(name.startswith("biases") for name in found)
    assert_close(found["origin"], torch.zeros_like(found["origin"]))


# The same result again


def test_the_same_seed_gives_the_same_files_twice_and_another_seed_other_weights(train, tmp_path):
    for out, seed in (("a", 5), ("b", 5), ("c", 7)):
        torch.rand(3)  # the state of the global generator is no matter
        train("--out", tmp_path / out, "--seed", seed)
    first, second, third = (contents(tmp_path / out)["model.safetensors"] for out in "abc")
    assert first == second != third


@pytest.mark.parametrize("preset", settings.PRESETS)
def test_stages_run_one_by_one_give_the_same_model_as_all_together(preset, train, tmp_path):
    train("--preset", preset, "--out", tmp_path / "together")
    for stage in (1, 2, 3):
        assert train("--preset", preset, "--stage", stage, "--out", tmp_path / "alone") == 0
        assert (tmp_path / "alone" / "model.safetensors").exists() == (stage == 3)
    assert_same_model(tmp_path / "alone", tmp_path / "together")


@pytest.mark.parametrize("preset", settings.PRESETS)
def test_a_run_interrupted_again_and_again_gives_the_same_model_in_the_end(
    preset, train, tmp_path, monkeypatch, capsys
):
    """Every 13 updates the user presses Ctrl-C, and starts again with --resume."""
    train("--preset", preset, "--out", tmp_path / "whole")
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    batch_rows, left = training.batch_rows, [13]

    def interrupted(*arguments):
        left[0] -= 1
        if left[0] < 0:
            left[0] = 13
            raise KeyboardInterrupt
        return batch_rows(*arguments)

    monkeypatch.setattr(training, "batch_rows", interrupted)
    codes = []
    while 0 not in codes:
        codes.append(train("--preset", preset, "--out", tmp_path / "run", "--resume"))
    assert codes == [130] * (4 if preset == "sparse" else 7) + [0]
    assert "--resume goes on from the last checkpoint" in capsys.readouterr().err
    assert_same_model(tmp_path / "run", tmp_path / "whole")
    for stage in checkpoints.read_json(tmp_path / "run" / "metrics.json")["stages"].values():
        assert stage["steps"] == sorted(set(stage["steps"]))


AGAIN_AND_AGAIN = """
import runpy, sys
from capsnb import training
training._SECONDS_BETWEEN_CHECKPOINTS = -1.0
sys.argv[0] = "capsnb"
runpy.run_module("capsnb", run_name="__main__")
"""


def test_a_run_that_was_killed_goes_on_and_gives_the_same_bytes_as_one_that_was_not(folder, tmp_path):
    """kill -9 in the middle of stage 1 and again in the middle of stage 2, at full size."""
    home = Path(capsnb.__file__).parents[1]
    arguments = ["train", "--dataset", str(folder), "--quick", "--device", "cpu", "--resume", "--out"]

    def steps_of(stage):
        try:
            return checkpoints.read_facts(tmp_path / "killed" / f"stage{stage}.safetensors").get("step", 0)
        except FileNotFoundError:
            return 0

    def kill_in(stage, after):
        command = [sys.executable, "-c", AGAIN_AND_AGAIN, *arguments, str(tmp_path / "killed")]
        process = subprocess.Popen(command, cwd=home, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 600
        while steps_of(stage) < after and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors.decode()

    def run(out):
        command = [sys.executable, "-m", "capsnb", *arguments, str(tmp_path / out)]
        subprocess.run(command, cwd=home, check=True, capture_output=True)

    kill_in(stage=1, after=1)
    assert 1 <= steps_of(1) < 3
    kill_in(stage=2, after=7)
    assert 7 <= steps_of(2) < 40
    run("killed")
    run("whole")
    assert contents(tmp_path / "killed")["model.safetensors"] == contents(tmp_path / "whole")["model.safetensors"]
    model = load_model(tmp_path / "whole" / "model.safetensors")
    assert model.settings == settings.quick(settings.PRESETS["sparse"])


# What is refused, with nothing lost


def test_a_folder_that_holds_a_run_is_not_overwritten(train, tmp_path, capsys):
    train("--out", tmp_path)
    before = contents(tmp_path)
    assert train("--out", tmp_path) == 2
    assert "holds stage 1 already; add --resume to go on, or change --out" in capsys.readouterr().err
    assert train("--stage", 2, "--out", tmp_path) == 2
    assert "holds stage 2 already" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_resuming_a_finished_run_changes_no_weights(train, tmp_path):
    train("--out", tmp_path)
    before = contents(tmp_path)
    assert train("--out", tmp_path, "--resume") == 0
    after = contents(tmp_path)
    assert {name: after[name] == before[name] for name in before if name != "metrics.json"} == {
        name: True for name in before if name != "metrics.json"
    }
    stages = [json.loads(files["metrics.json"])["stages"] for files in (before, after)]
    assert stages[0] == stages[1]


@pytest.mark.parametrize(
    "name, change",
    [
        ("seed", ["--seed", 7]),
        ("settings", ["--preset", "dense"]),
        ("settings", ["--autoencoder", "bias-free"]),
        ("dataset", ["--dataset", "mnist"]),
    ],
)
def test_a_run_with_another_seed_setting_or_data_set_is_not_gone_on_with(name, change, train, tmp_path, capsys):
    train("--stage", 1, "--out", tmp_path)
    before = contents(tmp_path)
    assert train("--out", tmp_path, "--resume", *change) == 2
    assert f"holds a run with {name} " in (message := capsys.readouterr().err) and "choose another --out" in message
    assert contents(tmp_path) == before


def test_a_run_on_another_number_of_images_is_not_gone_on_with(small_presets, digits, tmp_path):
    run = runs.Run(settings.PRESETS["dense"], "mnist", tmp_path)
    runs.train(run, digits[0][:127], stages=(1,))
    with pytest.raises(ValueError, match="holds a run with images 127, not 113; choose another --out"):
        runs.train(run, digits[0][:113], stages=(2,))


def test_settings_that_differ_only_in_the_checkpoint_are_noticed(train, tmp_path, capsys):
    train("--stage", 1, "--out", tmp_path)
    (tmp_path / "metrics.json").unlink()
    assert train("--autoencoder", "bias-free", "--stage", 2, "--out", tmp_path) == 2
    assert "holds stage 1 with other settings; choose another --out" in capsys.readouterr().err


def test_a_stage_whose_predecessor_is_missing_or_unfinished_is_not_begun(train, tmp_path, capsys, monkeypatch):
    assert train("--stage", 2, "--out", tmp_path / "empty") == 2
    assert "has no finished stage 1; run it with --stage 1" in capsys.readouterr().err
    monkeypatch.setattr(training, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    run = runs.Run(settings.quick(settings.PRESETS["sparse"]), "mine", tmp_path / "begun")
    path = tmp_path / "begun" / "stage1.safetensors"
    model = ExpertCapsules(run.settings)
    next(training.train_autoencoder(model.autoencoder, torch.zeros(7, 1, 28, 28), seed=0, checkpoint=path))
    assert train("--stage", 2, "--out", tmp_path / "begun") == 2
    assert "has no finished stage 1" in capsys.readouterr().err


@pytest.mark.parametrize("damaged", ["stage1.safetensors", "metrics.json"])
def test_a_damaged_file_is_named_and_the_others_are_left_alone(damaged, train, tmp_path, capsys):
    train("--stage", 1, "--out", tmp_path)
    (tmp_path / damaged).write_bytes((tmp_path / damaged).read_bytes()[:-10])
    before = contents(tmp_path)
    assert train("--out", tmp_path, "--resume") == 2
    assert re.search(rf"{damaged} is not .*; (delete it and remake it|make it again)", capsys.readouterr().err)
    assert contents(tmp_path) == before


def test_images_with_nan_are_refused_before_anything_is_written(small_presets, tmp_path):
    images = torch.zeros(7, 1, 28, 28)
    images[3] = float("nan")
    with pytest.raises(ValueError, match="images holds NaN"):
        runs.train(runs.Run(settings.PRESETS["dense"], "mine", tmp_path / "run"), images)
    assert not (tmp_path / "run").exists()


def test_bad_options_end_with_a_message_and_code_2(small_presets, tmp_path, capsys, monkeypatch):
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", "--dataset", "minst", *out]) == 2
    assert "unknown data set 'minst'; choose one of mnist" in capsys.readouterr().err
    for options, message in (
        (["--dataset", "mnist", "--preset", "spares"], "'sparse', 'dense', 'paper'"),
        (["--dataset", "mnist", "--stage", "4"], "'1', '2', '3', 'all'"),
        (["--dataset", "mnist", "--device", "gpu"], "'gpu' cannot be used here .*; try cpu"),
        (["--dataset", "mnist", "--device", "cuda:99"], "'cuda:99' cannot be used here .*; try cpu"),
        ([], "--dataset"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["train", *options, *out])
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_a_data_set_that_cannot_be_had_ends_with_a_message(small_presets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.MNIST.download", lambda self: None)
    monkeypatch.setenv("CAPSNB_DATA", str(tmp_path / "empty"))
    assert main(["train", "--dataset", "kmnist", "--quick", "--out", str(tmp_path / "run")]) == 2
    assert "kmnist is not in" in (message := capsys.readouterr().err) and "set CAPSNB_DATA" in message


def test_quick_runs_take_the_shipped_sample(small_presets, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CAPSNB_DATA", str(tmp_path / "empty"))
    out = tmp_path / "run"
    assert main(["train", "--dataset", "fashion-mnist", "--quick", "--stage", "1", "--out", str(out)]) == 0
    assert "1000 images of fashion-mnist" in capsys.readouterr().out
    assert not (tmp_path / "empty").exists()


def test_a_folder_that_cannot_be_written_ends_with_a_message(train, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert train("--out", tmp_path / "file" / "run") == 2
    assert re.search("capsnb: .*Not a directory", capsys.readouterr().err)


# sample, evaluate, export


@pytest.fixture
def trained(train, tmp_path):
    train("--out", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("domain", ["complete", "restricted", "fitted"])
def test_sample_writes_a_picture_of_every_capsule(domain, trained, tmp_path, capsys):
    picture = tmp_path / "new" / "fig2.png"
    options = ["--model", str(trained / "model.safetensors"), "--domain", domain, "--rows", "3", "--out", str(picture)]
    assert main(["sample", *options]) == 0
    assert f"3 uncurated samples of every capsule, {domain} domain" in capsys.readouterr().out
    assert plt.imread(picture).ndim == 3
    (axis,) = plt.gcf().axes
    assert axis.images[0].get_array().shape == (3 * 30 + 2, 5 * 30 + 2)
    first = picture.read_bytes()
    main(["sample", *options])
    assert picture.read_bytes() == first
    main(["sample", *options, "--seed", "7"])
    assert picture.read_bytes() != first
    plt.close("all")


def test_sample_refuses_unknown_models_domains_and_no_rows(trained, tmp_path, capsys):
    out = ["--out", str(tmp_path / "fig2.png")]
    assert main(["sample", "--model", "minst", *out]) == 2
    assert "minst does not exist" in capsys.readouterr().err
    assert main(["sample", "--model", str(trained / "stage2.safetensors"), *out]) == 2
    assert "is not a whole model" in capsys.readouterr().err
    assert main(["sample", "--model", "vae-mnist", *out]) == 2
    assert "sample is for expert-capsules, not for vae, which vae-mnist holds" in capsys.readouterr().err
    assert main(["sample", "--model", str(trained / "model.safetensors"), "--rows", "0", *out]) == 2
    assert "--rows is 0, expected at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["sample", "--domain", "half", *out])
    assert not (tmp_path / "fig2.png").exists()


def test_evaluate_prints_a_table_and_writes_the_same_numbers_as_json(trained, folder, tmp_path, capsys):
    options = ["--model", str(trained / "model.safetensors"), "--dataset", str(folder), "--seed", "3"]
    capsys.readouterr()
    assert main(["evaluate", *options, "--out", str(tmp_path / "new" / "evaluation.json")]) == 0
    table = capsys.readouterr().out.splitlines()
    content = checkpoints.read_json(tmp_path / "new" / "evaluation.json")
    assert (content["dataset"], content["seed"]) == (str(folder), 3)
    assert content["versions"]["torch"] == torch.__version__
    measures = content["measures"]
    assert (measures["train_images"], measures["test_images"]) == (101, 103)
    printed = {line.split()[0]: float(line.split()[1]) for line in table if len(line.split()) == 2}
    assert {"purity", "linear_probe", "reconstruction_mse", "kmeans_purity", "capsules_in_use"} <= set(printed)
    for name, value in printed.items():
        assert value == pytest.approx(measures[name], rel=1e-3)
    for domain in ("complete", "restricted", "fitted"):
        (line,) = [line for line in table if line.startswith(f"{domain} domain")]
        assert f"negative_share {measures['samples'][domain]['negative_share']:.3f}" in line


def test_export_writes_half_precision_and_the_metrics(trained, tmp_path):
    target = tmp_path / "weights" / "mine.safetensors"
    assert main(["export", str(trained), str(target)]) == 0
    whole, half = tensors(trained / "model.safetensors"), tensors(target)
    assert_close(half, {name: tensor.half() for name, tensor in whole.items()}, rtol=0, atol=0)
    facts = checkpoints.read(target)[1]
    assert facts == checkpoints.read(trained / "model.safetensors")[1]
    assert contents(target.parent)["mine.metrics.json"] == contents(trained)["metrics.json"]
    other = tmp_path / "weights" / "other.safetensors"
    assert main(["export", str(trained), str(other), "--share-autoencoder", "mine.safetensors"]) == 0
    assert other.stat().st_size < target.stat().st_size
    assert_close(dict(load_model(other).state_dict()), dict(load_model(target).state_dict()), rtol=0, atol=0)


def test_export_of_an_unfinished_run_ends_with_a_message(train, tmp_path, capsys):
    train("--stage", 1, "--out", tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "mine.safetensors")]) == 2
    assert "model.safetensors does not exist; train it with" in capsys.readouterr().err
    assert not (tmp_path / "mine.safetensors").exists()


def test_the_module_is_a_program_with_help():
    command = [sys.executable, "-m", "capsnb", "--help"]
    home = Path(capsnb.__file__).parents[1]
    shown = subprocess.run(command, cwd=home, capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in ("train", "sample", "evaluate", "export"))


def test_a_run_on_an_accelerator_leaves_a_model_for_the_cpu(accelerator, small_presets, folder, tmp_path):
    out = str(tmp_path / "run")
    assert main(["train", "--dataset", str(folder), "--quick", "--device", accelerator, "--out", out]) == 0
    assert load_model(tmp_path / "run" / "model.safetensors").poses.mean.device.type == "cpu"


@pytest.mark.skipif(not pretend.available, reason="this torch cannot be given a device by python")
@pytest.mark.parametrize("preset, waits", [("sparse", 7), ("dense", 4), ("paper", 4)])
def test_an_update_of_stage_2_waits_for_an_accelerator_but_a_few_times(preset, waits, small_settings, digits):
    """For rows, maps of views, the loss, and where routing, the mask and the optimiser look at their inputs."""
    torch.manual_seed(0)
    with pretend.Pretending() as device:
        model = ExpertCapsules(small_settings(preset)).to(pretend.NAME)
        lessons = runs.Encoded(model, digits[0][:62].to(pretend.NAME)).lessons
        after = [device.waits for _ in training.train_encoder(model.encoder.train(), lessons, seed=0)]
    assert {now - before for before, now in zip(after, after[1:])} == {waits}
