"""The experiment on affine digits: what changes alone, the machine, what every row sees and encodes, and its files."""

import json

import pytest
import torch
from torch.testing import assert_close

from capsnb import checkpoints
from capsnb.affine_mnist import FramedDigits, regenerate
from capsnb.evaluation import svm_probe
from capsnb.windows import answers, best_window, centred_window, crop, lower_map, window_capsules
from experiments import affine_codes, affine_mnist
from experiments.affine_codes import CODES, Views
from experiments.affine_mnist import CHANGES, ROWS, Machine, changed_alone, framed, main, placement, shipped
from experiments.seeds import all_poses


@pytest.fixture
def small(small_model, digits, monkeypatch):
    """The small model instead of the shipped one, and few digits."""
    monkeypatch.setattr(affine_codes, "load_pretrained", {"mnist": small_model}.get)
    part = {"train": slice(0, 59), "test": slice(59, 146)}
    monkeypatch.setattr(affine_mnist.data, "load", lambda name, split, sample: [each[part[split]] for each in digits])
    monkeypatch.setattr(affine_mnist, "QUICK_CLASSIFIED", 53)
    monkeypatch.setattr(affine_mnist, "QUICK_ALONE", 7)
    monkeypatch.setattr(affine_mnist, "FEW", (31,))
    return small_model


@pytest.fixture
def views(small):
    return Views(framed(True, 3), True, 3)


@pytest.mark.parametrize("change", CHANGES)
def test_one_change_leaves_out_the_others(change, digits, monkeypatch, rng):
    seen = []
    monkeypatch.setattr(affine_mnist, "transform", lambda *given: seen.extend(given[1:]) or torch.zeros(53, 1, 40, 40))
    changed_alone(digits[0][:53], digits[1][:53], change, rng=rng)
    maps, moves = seen
    across, down = maps.unbind(2)  # where the unit steps go
    kept = {"turned": False, "slanted": False, "stretched": False, "moved": False}
    kept["turned"] = (across[:, 1] == 0).all()
    kept["slanted"] = ((across * down).sum(1).abs() < 1e-6).all()
    kept["stretched"] = ((torch.linalg.det(maps) - 1).abs() < 1e-6).all()
    kept["moved"] = (moves == 0).all()
    assert {name for name in CHANGES if not kept[name]} == {change}


def test_the_sets_are_those_of_the_protocols_and_the_tested_digits_are_every_other_one(small, digits):
    sets = framed(True, 3)
    assert {name: len(each.images) for name, each in sets.items()} == {
        **dict.fromkeys(("placed", "affine", "plain"), 53),
        **dict.fromkeys(("affine test", "plain test"), 44),
        **{f"{change} test": 7 for change in CHANGES},
    }
    assert torch.equal(sets["plain test"].images[:, :, 6:34, 6:34], digits[0][59:146:2])
    assert torch.equal(sets["affine test"].labels, digits[1][59:146:2])
    assert sets["affine"].is_regenerated and sets["affine test"].is_regenerated and not sets["plain"].is_regenerated


def test_the_machine_is_that_of_the_probe(digits):
    train, labels, test, truth = digits[0][:307, 0], digits[1][:307], digits[0][307:700, 0], digits[1][307:700]
    expected = svm_probe(train, labels, test, truth)
    assert Machine(train, labels).accuracy(test, truth) == pytest.approx(expected, abs=3e-3)
    far = torch.cdist(test.flatten(1), train.flatten(1)).square()
    assert_close(torch.as_tensor(Machine(train, labels, gamma=0.1).kernel(test)), (-0.1 * far).exp())


def test_rows_of_systems_that_do_not_ship_are_left_out(monkeypatch, tmp_path):
    assert {"frame", "windows", "random-windows", "unviewed-windows", "mass"} == {row.where for row in ROWS.values()}
    assert set(CODES) == {row.code for row in ROWS.values()}
    monkeypatch.setattr(affine_mnist, "WEIGHTS", tmp_path)
    (tmp_path / "rbm.safetensors").touch()
    assert [name for name in ROWS if shipped(name)] == ["windows-pixels", "mass-pixels", "mass-rbm", *list(ROWS)[-2:]]


def test_windows_are_those_that_the_trained_or_the_random_capsules_answer_most(views, monkeypatch):
    monkeypatch.setattr(affine_codes, "PART", 17)
    frames = views.frames("affine test")
    assert frames.shape == (44, 1, 56, 56)
    for where, W in (("windows", views.model.encoder.W.detach()), ("random-windows", views.W("random"))):
        expected = best_window(answers(window_capsules(lower_map(views.model, frames), W)))
        assert (views.places(where, "affine test") == expected).float().mean() > 0.9  # the search has fewer digits
    assert torch.equal(views.places("mass", "affine test"), centred_window(frames))
    assert not torch.equal(views.places("windows", "affine test"), views.places("random-windows", "affine test"))


def test_codes_are_taken_of_what_the_row_sees(views, small):
    seen = crop(views.frames("plain"), views.places("windows", "plain"))
    assert torch.equal(views.images("windows", "plain"), seen)
    near = {"atol": 0.02, "rtol": 0}  # stage 1 ran in half precision
    found = {name: CODES[name].make(views, "windows")("plain") for name in ("pixels", "one-on", "all-on", "random")}
    assert_close(found["pixels"], seen.flatten(1))
    same = (found["one-on"].norm(dim=2) > 0) == (small.encode(seen).norm(dim=2) > 0)
    assert same.float().mean() > 0.9
    agreeing = same.all(1)
    assert_close(found["one-on"][agreeing], small.encode(seen)[agreeing], **near)
    lower = small.lower_capsules(seen).detach().flatten(1)
    for name, W in (("all-on", small.encoder.W.detach()), ("random", views.W("random"))):
        assert_close(found[name], all_poses(W, lower), **near)
    longest = found["random"].norm(dim=2) == found["random"].norm(dim=2).amax(1, keepdim=True)
    assert torch.equal(CODES["random-one-on"].make(views, "windows")("plain"), found["random"] * longest.unsqueeze(2))
    assert torch.equal(CODES["pixels"].make(views, "frame")("placed"), views.sets["placed"].images.flatten(1))


def test_capsules_without_views_are_another_stage_2_of_the_same_model_trained_once(views, small, monkeypatch):
    fits, fit = [], affine_codes.fit
    monkeypatch.setattr(affine_codes, "fit", lambda *given: fits.append(given) or fit(*given))
    names = ("unviewed-one-on", "unviewed-all-on", "one-on")
    codes = {name: CODES[name].make(views, "mass")("plain") for name in names}
    ((_, untrained, rows, seed),) = fits
    assert untrained.settings.encoder.views is None and untrained.autoencoder is small.autoencoder
    assert len(rows.images) == 59 and seed == 3
    assert not torch.equal(codes["unviewed-one-on"], codes["one-on"])
    W = views.encoder("unviewed").W.detach()
    assert_close(codes["unviewed-all-on"], all_poses(W, views.lower("mass", "plain").float().flatten(1)))


def test_principal_components_are_fitted_to_placed_digits_alone(views):
    code = CODES["pca"].make(views, "frame")
    placed = code("placed")
    assert_close(placed.mean(0), torch.zeros(53), atol=1e-4, rtol=0)
    pixels = views.sets["placed"].images.flatten(1)
    assert_close(torch.cdist(placed, placed), torch.cdist(pixels, pixels), atol=1e-2, rtol=0)  # 53 of them span all


def test_other_systems_encode_the_windows(views):
    vae = affine_codes.load_vae()
    with torch.no_grad():
        expected = vae.posterior(views.images("mass", "plain"))[0]
    assert_close(CODES["vae"].make(views, "mass")("plain"), expected, atol=1e-4, rtol=1e-4)


def test_placement_counts_windows_near_the_centre_of_mass_and_the_ink_outside(views):
    frames = torch.zeros(4, 1, 40, 40)
    frames[:, :, 10, 20] = frames[:, :, 11, 21] = 1.0  # the centre is 18.5, 28.5 in the frame with room about it
    views.sets["affine test"] = FramedDigits(frames, torch.zeros(4).long(), "two dots each")
    places = torch.tensor([[5, 15], [6, 14], [7, 15], [19, 2]])
    views.kept["windows places", "affine test"] = places
    found = placement(views, "windows")
    assert found == {"within_1": 0.5, "within_2": 0.75, "cut": pytest.approx(0.25 * 0.5)}


def test_a_quick_run_writes_its_rows_and_a_second_one_measures_only_what_is_missing(small, monkeypatch, tmp_path):
    out = tmp_path / "affine.json"
    arguments = ["--quick", "--seed", "3", "--out", str(out), "--only"]
    monkeypatch.setattr(affine_mnist, "shipped", lambda name: name != "mass-capsnet")
    main([*arguments, "windows-one-on", "frame-pixels", "mass-capsnet"])
    content = json.loads(out.read_text())
    assert content["quick"] is True and list(content["rows"]) == ["windows-one-on", "frame-pixels"]
    row = content["rows"]["windows-one-on"]
    assert {"a", "b", "mnist", "a_published_settings", "few", "alone", "gamma"} <= set(row)
    assert row["classifier_images"] == 53 and row["test_images"] == 44 and row["numbers"] == 35
    assert set(content["windows"]) == {"windows"} and set(row["alone"]) == set(CHANGES) and set(row["few"]) == {"31"}
    pictures = checkpoints.read(out.with_suffix(".safetensors"))[0]
    assert {name: tuple(each.shape) for name, each in pictures.items()} == {
        "frames": (12, 40, 40), "windows-one-on": (12, 28, 28), "frame-pixels": (12, 40, 40)
    }  # fmt: skip
    measured, calls = affine_mnist.measure, []
    monkeypatch.setattr(affine_mnist, "measure", lambda *given: calls.append(1) or measured(*given))
    main([*arguments, "windows-one-on", "mass-random"])
    assert calls == [1] and list(json.loads(out.read_text())["rows"])[2:] == ["mass-random"]
    assert json.loads(out.read_text())["rows"]["windows-one-on"] == row


def test_the_affine_sets_of_a_seed_are_the_generators(small, digits):
    expected = regenerate(digits[0][:53], digits[1][:53], rng=after_placing(53, 3))
    assert torch.equal(framed(True, 3)["affine"].images, expected.images)


def after_placing(count, seed):
    """The generator once the digits have been placed, which comes first."""
    rng = torch.Generator().manual_seed(seed)
    torch.randint(13, (2, count), generator=rng)
    return rng
