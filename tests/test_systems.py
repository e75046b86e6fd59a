"""The systems beside expert capsules: whole runs by the command line, and the files that ship."""

from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from capsnb import checkpoints, data, measures, systems
from capsnb.__main__ import main
from capsnb.baselines.capsnet import CapsNetSettings
from capsnb.baselines.matrix_capsules import EMRoutingSettings
from capsnb.baselines.rbm import DigitRBMSettings
from capsnb.baselines.sparse_capsules import SparseCapsulesSettings
from capsnb.baselines.vae import VAESettings
from capsnb.classifier import ClassifierSettings
from capsnb.packing import shrunk
from capsnb.pretrained import NAMES, WEIGHTS
from capsnb.systems import SYSTEMS

CAPSULES = {"channels": 3, "types": 2, "primary_dim": 3, "dim": 5, "first_hidden": 7, "second_hidden": 11, "batch": 11}
SPARSE = SparseCapsulesSettings(capsules=7, boost_every=3, **CAPSULES)
UNSUPERVISED = {"sparse": SPARSE, "dense": replace(SPARSE, gamma=0.0)}
FRAMES = {f"{name}-frames": replace(settings, size=40, stride=4) for name, settings in UNSUPERVISED.items()}
SMALL = {
    "rbm": {"default": DigitRBMSettings(hidden=5, batch=11)},
    "capsnet": {"default": CapsNetSettings(**CAPSULES)},
    "em-routing": {"short": EMRoutingSettings(filters=7, primary=2, first=3, second=5, batch=11, margin_updates=10)},
    "sparse-capsules": UNSUPERVISED | FRAMES,
    "vae": {"default": VAESettings(latent=3, channels=5, batch=11)},
    "classifier": {"default": ClassifierSettings(first_channels=3, channels=5, features=7, batch=11)},
}
STEPS = {name: 15 if name == "rbm" else 14 for name in SMALL}  # in one and a half times 101 images
each_system = pytest.mark.parametrize("name", SYSTEMS)


@pytest.fixture
def small(monkeypatch, one_thread):
    """Every system with few parameters, trained for one and a half epochs, a checkpoint after every update."""
    for name, presets in SMALL.items():
        for preset, settings in presets.items():
            monkeypatch.setitem(SYSTEMS[name].presets, preset, settings)
    monkeypatch.setattr(systems, "QUICK_EPOCHS", 1.5)
    monkeypatch.setattr(measures, "TEMPERATURES", 5)
    monkeypatch.setattr(measures, "CHAINS", 7)
    monkeypatch.setattr("capsnb.training._SECONDS_BETWEEN_CHECKPOINTS", -1.0)


@pytest.fixture
def train(small, folder):
    """Train a small system with the command line; the arguments are those after --system."""
    options = ["--dataset", str(folder), "--quick", "--device", "cpu"]
    return lambda *arguments: main(["train", *options, "--system", *(str(argument) for argument in arguments)])


@pytest.fixture
def stop_at(monkeypatch):
    """From now on the user presses Ctrl-C after the update of that number; never for None."""
    originals = dict(SYSTEMS)

    def stop(name, last):
        def stopping(*inputs, **options):
            for step in originals[name].train(*inputs, **options):
                yield step
                if step.step == last:
                    raise KeyboardInterrupt

        monkeypatch.setitem(SYSTEMS, name, originals[name]._replace(train=stopping))

    return stop


def weights(path):
    return checkpoints.read(path / "model.safetensors")[0]


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


# A run and its folder


@each_system
def test_a_run_leaves_a_model_that_says_what_it_is_and_its_metrics(name, train, folder, tmp_path, capsys):
    assert train(name, "--out", tmp_path / "run", "--seed", 5) == 0
    preset = next(iter(SMALL[name]))
    assert f"holds {name} ({preset}): 101 images of {folder}" in capsys.readouterr().out
    assert sorted(contents(tmp_path / "run")) == ["metrics.json", "model.safetensors"]
    metrics = checkpoints.read_json(tmp_path / "run" / "metrics.json")
    settings = asdict(replace(SMALL[name][preset], epochs=1.5))
    facts = {"system": name, "dataset": str(folder), "images": 101, "seed": 5, "quick": True, "settings": settings}
    assert facts.items() <= metrics.items() and metrics["seconds"] >= 0 and metrics["peak_memory_mb"] > 50
    assert metrics["steps"] == [10, STEPS[name]] and len(metrics["loss"]) == 2
    found = checkpoints.read(tmp_path / "run" / "model.safetensors")[1]
    assert found == facts | {"versions": metrics["versions"]}
    system, network = systems.load(tmp_path / "run" / "model.safetensors")
    assert system is SYSTEMS[name] and asdict(network.settings) == settings and not network.training
    assert_close(dict(network.state_dict()), weights(tmp_path / "run"), rtol=0, atol=0)


@each_system
def test_a_run_interrupted_twice_ends_with_the_weights_of_one_that_was_not(name, train, stop_at, tmp_path, capsys):
    train(name, "--out", tmp_path / "whole", "--seed", 5)
    for last in (4, 12):
        stop_at(name, last)
        assert train(name, "--out", tmp_path / "parts", "--seed", 5, "--resume") == 130
        assert "--resume goes on from the last checkpoint" in capsys.readouterr().err
        assert not (tmp_path / "parts" / "model.safetensors").exists()
    stop_at(name, None)
    assert train(name, "--out", tmp_path / "parts", "--seed", 5, "--resume") == 0
    assert_close(weights(tmp_path / "parts"), weights(tmp_path / "whole"), rtol=0, atol=0)


@each_system
def test_the_seed_decides_the_weights(name, train, tmp_path):
    for out, seed in (("a", 5), ("b", 5), ("c", 7)):
        torch.rand(3)  # the state of the global generator is no matter
        train(name, "--out", tmp_path / out, "--seed", seed)
    first, second, third = (contents(tmp_path / out)["model.safetensors"] for out in "abc")
    assert first == second != third


@each_system
def test_only_systems_that_learn_from_labels_look_at_them(name, train, small, folder, write_folder, tmp_path):
    images, labels = (data.load(str(folder), "train")[part] for part in (0, 1))
    as_bytes = (images[:, 0] * 255).round().to(torch.uint8)
    wrong = write_folder(tmp_path / "wrong", {"train": (as_bytes, ((labels + 3) % 10).to(torch.uint8))})
    train(name, "--out", tmp_path / "right")
    options = ["--system", name, "--dataset", str(wrong), "--quick", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(["train", *options]) == 0
    right, found = weights(tmp_path / "right"), weights(tmp_path / "run")
    assert all(torch.equal(found[key], right[key]) for key in right) != SYSTEMS[name].labels


def test_the_dense_capsules_are_the_sparse_ones_without_their_mask(train, tmp_path):
    assert train("sparse-capsules", "--preset", "dense", "--out", tmp_path) == 0
    settings = checkpoints.read(tmp_path / "model.safetensors")[1]["settings"]
    assert settings["gamma"] == 0 and settings == asdict(replace(SPARSE, gamma=0.0, epochs=1.5))
    presets = SYSTEMS["sparse-capsules"].presets
    assert presets["dense"] == replace(presets["sparse"], gamma=0.0)


@pytest.mark.parametrize("mask", ["sparse", "dense"])
def test_a_preset_for_affine_mnist_learns_from_and_is_measured_on_digits_in_its_frames(mask, train, tmp_path):
    assert train("sparse-capsules", "--preset", f"{mask}-frames", "--out", tmp_path / "run") == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "small.safetensors")]) == 0
    _, network = systems.load(tmp_path / "small.safetensors")
    assert network.encode(torch.zeros(3, 1, 40, 40)).shape == (3, 7, 5)
    presets = SYSTEMS["sparse-capsules"].presets
    assert presets[f"{mask}-frames"] == replace(presets[mask], size=40, stride=4)


@each_system
def test_a_run_on_an_accelerator_goes_on_and_leaves_a_network_for_the_cpu(
    name, accelerator, small, folder, stop_at, tmp_path
):
    options = ["--dataset", str(folder), "--quick", "--device", accelerator, "--system", name, "--out", str(tmp_path)]
    stop_at(name, 4)
    assert main(["train", *options]) == 130
    stop_at(name, None)
    assert main(["train", *options, "--resume"]) == 0
    assert {value.device.type for value in weights(tmp_path).values()} == {"cpu"}


# What is refused, with nothing lost


def test_a_folder_that_holds_a_run_is_not_overwritten_finished_or_not(train, stop_at, tmp_path, capsys):
    stop_at("vae", 4)
    train("vae", "--out", tmp_path)
    for last in (None, None):
        before = contents(tmp_path)
        assert train("vae", "--out", tmp_path) == 2
        assert "holds a run already; add --resume to go on, or change --out" in capsys.readouterr().err
        assert contents(tmp_path) == before
        stop_at("vae", last)
        train("vae", "--out", tmp_path, "--resume")


def test_resuming_a_finished_run_changes_nothing(train, tmp_path):
    train("vae", "--out", tmp_path)
    before = contents(tmp_path)
    assert train("vae", "--out", tmp_path, "--resume") == 0
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "fact, change",
    [
        ("system", ["vae"]),
        ("system", ["expert-capsules", "--stage", 1]),
        ("settings", ["sparse-capsules", "--preset", "dense"]),
        ("seed", ["sparse-capsules", "--seed", 7]),
        ("dataset", ["sparse-capsules", "--dataset", "mnist"]),
    ],
)
def test_a_run_of_another_kind_is_not_gone_on_with(fact, change, train, tmp_path, capsys):
    train("sparse-capsules", "--out", tmp_path)
    before = contents(tmp_path)
    assert train(*change, "--out", tmp_path, "--resume") == 2
    assert f"holds a run with {fact} " in (message := capsys.readouterr().err) and "choose another --out" in message
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["vae", "--preset", "dense"], "unknown preset of vae 'dense'; choose one of 'default'"),
        (["rbm", "--stage", "1"], "--stage and --autoencoder are for expert-capsules, not for rbm"),
        (["rbm", "--autoencoder", "centred"], "--stage and --autoencoder are for expert-capsules, not for rbm"),
        (["capsnet", "--dataset", "minst"], "unknown data set 'minst'"),
    ],
)
def test_options_of_another_system_end_with_a_message(arguments, message, train, tmp_path, capsys):
    assert train(*arguments, "--out", tmp_path / "run") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_an_unknown_system_is_named_with_the_known_ones(train, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        train("capsnett", "--out", tmp_path / "run")
    assert "'expert-capsules', 'rbm', 'capsnet', 'em-routing'" in capsys.readouterr().err


def test_labels_beyond_the_classes_are_refused_where_they_matter(small, folder, write_folder, tmp_path, capsys):
    images = torch.zeros(101, 28, 28, dtype=torch.uint8)
    wrong = write_folder(tmp_path / "wrong", {"train": (images, torch.arange(101).to(torch.uint8))})
    options = ["train", "--dataset", str(wrong), "--quick", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main([*options, "--system", "capsnet"]) == 2
    assert "labels lie in [0, 100], expected [0, 9]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and main([*options, "--system", "vae"]) == 0


# evaluate and export


@each_system
def test_an_exported_network_is_measured_as_it_is_stored(name, train, folder, tmp_path, capsys):
    train(name, "--out", tmp_path / "run")
    capsys.readouterr()
    out = tmp_path / "weights" / "mine.safetensors"
    assert main(["export", str(tmp_path / "run"), str(out)]) == 0
    printed = capsys.readouterr().out
    assert sorted(contents(out.parent)) == ["mine.metrics.json", "mine.safetensors"]
    metrics = checkpoints.read_json(out.with_suffix(".metrics.json"))
    test = metrics.pop("test")
    assert metrics == checkpoints.read_json(tmp_path / "run" / "metrics.json") and test["images"] == 103
    stored, facts = checkpoints.read(out)
    assert facts == checkpoints.read(tmp_path / "run" / "model.safetensors")[1]
    assert {value.dtype for value in stored.values()} <= {torch.float16, torch.int64, torch.int8}
    assert {key for key, value in stored.items() if value.dtype == torch.int8} == set(SYSTEMS[name].filters)
    options = ["--model", str(out), "--dataset", str(folder), "--out", str(tmp_path / "evaluation.json")]
    assert main(["evaluate", *options]) == 0
    assert capsys.readouterr().out == printed != ""
    content = checkpoints.read_json(tmp_path / "evaluation.json")
    assert content["measures"] == test and content["dataset"] == str(folder) and "torch" in content["versions"]
    _, network = systems.load(out)
    assert_close(dict(network.state_dict()), weights(tmp_path / "run"), rtol=0.01, atol=0.01)
    assert any(not torch.equal(value, weights(tmp_path / "run")[key]) for key, value in network.state_dict().items())


def test_what_was_exported_can_be_exported_again_without_a_change(train, tmp_path):
    train("capsnet", "--out", tmp_path / "run")
    main(["export", str(tmp_path / "run"), str(tmp_path / "again" / "model.safetensors")])
    (tmp_path / "again" / "model.metrics.json").rename(tmp_path / "again" / "metrics.json")
    main(["export", str(tmp_path / "again"), str(tmp_path / "last.safetensors")])
    assert_close(checkpoints.read(tmp_path / "last.safetensors")[0], weights(tmp_path / "again"), rtol=0, atol=0)


def test_options_for_expert_capsules_are_refused(train, tmp_path, capsys):
    train("vae", "--out", tmp_path)
    assert main(["export", str(tmp_path), str(tmp_path / "mine"), "--share-autoencoder", "x"]) == 2
    assert "--share-autoencoder is for expert-capsules, not for vae" in capsys.readouterr().err
    assert main(["evaluate", "--model", str(tmp_path / "model.safetensors"), "--svm"]) == 2
    assert "--svm is for expert-capsules, not for vae" in capsys.readouterr().err


# The files that ship


@pytest.mark.parametrize("name, preset", [(name, preset) for name in SYSTEMS for preset in SYSTEMS[name].presets])
def test_no_system_of_full_size_ships_more_than_15_megabytes(name, preset, tmp_path):
    system = SYSTEMS[name]
    checkpoints.write(tmp_path / "w", shrunk(system.make(system.presets[preset]).state_dict(), system.filters))
    assert (tmp_path / "w").stat().st_size <= 15e6


def test_files_that_do_not_say_what_they_are_are_known_by_their_settings():
    expected = {"rbm": "rbm", "vae-mnist": "vae", "classifier-mnist": "classifier"}
    for file, name in {**expected, **dict.fromkeys(NAMES, "expert-capsules")}.items():
        facts = checkpoints.read(WEIGHTS / f"{file}.safetensors")[1]
        assert systems.system_of({"settings": facts["settings"]}) == name
    for name, system in SYSTEMS.items():
        for settings in system.presets.values():
            assert systems.system_of({"settings": asdict(settings)}) == name
    assert systems.system_of({}) == "expert-capsules"


def test_a_shipped_system_is_measured_by_its_name(capsys):
    assert main(["evaluate", "--model", "classifier-mnist", "--quick"]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(printed["accuracy"]) > 0.98 and float(printed["images"]) == 1000


def test_the_system_stands_in_the_metadata_of_a_weight_file(train, tmp_path):
    train("vae", "--out", tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert '"system": "vae"' in file.metadata()["capsnb"]
