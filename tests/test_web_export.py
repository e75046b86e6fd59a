"""The files of the website hold the models that ship: their tensors in the browser's order, and what widgets show."""

import hashlib
import json
from pathlib import Path

import build_kernel
import pytest
import torch

from capsnb import data, load_pretrained, movable, packing, web_export
from capsnb.__main__ import main
from capsnb.evaluation import winner

SHIPPED = Path(__file__).parents[1] / "book" / "_static" / "weights"


@pytest.fixture
def small(small_model, monkeypatch):
    """The small model, its large tensors in groups that divide them."""
    monkeypatch.setattr(packing, "PRECISION", {"U": (9, 8), "W": (8, 3), "filters2": (8, 6)})
    return small_model


@pytest.fixture
def facts(small):
    return web_export.manifest(small, "mnist")


def test_the_order_of_the_numbers_is_that_of_the_browsers_products(small, facts):
    tensors, stage1 = web_export.decoder_tensors(small, facts), small.autoencoder
    features, pose = torch.randn(1, 6, 6, 6), torch.randn(7)
    patches = tensors["filters2"].reshape(6 * 81, 6) @ features.view(6, 36)
    maps = torch.nn.functional.fold(patches, (20, 20), 9, stride=2)
    expected = torch.nn.functional.conv_transpose2d(features, stage1.filters2, stride=2, output_padding=1)
    torch.testing.assert_close(maps[None], expected)
    sent = (tensors["U.3"].flatten(1) * pose[:, None]).sum(0).view(72, 3)
    torch.testing.assert_close(sent, torch.einsum("ied,d->ie", small.decoder.U[3], pose))
    x = torch.randn(72, 3)
    received = web_export.encoder_tensors(small)["W.2"].flatten(1) @ x.flatten()
    torch.testing.assert_close(received, torch.einsum("ide,ie->d", small.encoder.W[:, 2], x))


def test_the_capsules_that_pages_begin_with_come_first_and_every_capsule_comes_once(small, facts):
    names = [name for name in web_export.decoder_tensors(small, facts) if name.startswith("U.")]
    codes = torch.tensor([digit["code"] for digit in facts["digits"]]).view(-1, 5, 7)
    assert sorted(names) == [f"U.{j}" for j in range(5)]
    order = [int(name.removeprefix("U.")) for name in names]
    begins = [order.index(j) for j in dict.fromkeys([0, *winner(codes).tolist()])]
    assert begins == [*range(len(begins))]


def test_the_manifest_shows_two_test_images_of_every_class_with_their_capsules(small):
    found = json.loads(json.dumps(web_export.manifest(small, "mnist")))
    images, labels = data.load("mnist", "test", sample=True)
    numbers = [digit["number"] for digit in found["digits"]]
    assert sorted(digit["label"] for digit in found["digits"]) == sorted([*range(10)] * 2)
    assert numbers == sorted(set(numbers))
    for digit in found["digits"]:
        image = torch.tensor(digit["image"]).view(1, 1, 28, 28) / 255
        torch.testing.assert_close(image[0], images[digit["number"]])
        assert digit["label"] == labels[digit["number"]]
        torch.testing.assert_close(torch.tensor(digit["code"]), small.encode(image).flatten(), rtol=0, atol=1e-6)


def test_the_manifest_says_the_commonest_class_that_every_capsule_wins(small):
    images, labels = data.load("mnist", "test", sample=True)
    winners = winner(small.encode(images))
    for j, kind in enumerate(web_export.manifest(small, "mnist")["kinds"]):
        mine = labels[winners == j]
        assert kind == (torch.bincount(mine).argmax() if len(mine) else -1)


def test_the_files_are_named_in_the_manifest_with_their_sizes_and_fingerprints(small, tmp_path):
    web_export.write(small, "mnist", tmp_path)
    for part, facts in json.loads((tmp_path / "mnist.json").read_text())["files"].items():
        content = (tmp_path / f"mnist.{part}.bin").read_bytes()
        assert facts["file"] == f"mnist.{part}.bin" and facts["bytes"] == len(content)
        assert hashlib.sha256(content).hexdigest().startswith(facts["digest"])


def test_writing_twice_writes_the_same(small, tmp_path):
    for folder in ("once", "twice"):
        web_export.write(small, "mnist", tmp_path / folder)
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()


def test_the_moment_of_the_features_is_that_of_what_the_second_filters_multiply(small):
    images = data.load("mnist", "train", sample=True)[0][:200]
    columns = small.autoencoder.encode(images).detach().double().permute(1, 0, 2, 3).reshape(6, -1)
    expected = sum(torch.outer(column, column) for column in columns.T) / columns.shape[1]
    torch.testing.assert_close(web_export.feature_moments(small, "mnist")["filters2"], expected)


def test_the_manifest_of_another_system_says_what_its_poses_are(small_networks, small_vae):
    (_, network), (_, vae) = small_networks["sparse-capsules"], small_vae
    for system, moved, bounded, reach in (("sparse-capsules", network, True, 0.25), ("vae", vae, False, 2.5)):
        facts = json.loads(json.dumps(web_export.manifest(moved, "mnist", system)))
        assert [facts["capsules"], facts["dim"]] == list(moved.poses.mean.shape)
        assert (facts["name"], facts["system"], facts["dataset"]) == (f"{system}-mnist", system, "mnist")
        assert (facts["poses"]["bounded"], facts["poses"]["reach"]) == (bounded, reach)
        assert facts["systems"]["vae"]["title"] == "VAE" and facts["systems"]["vae"]["datasets"] == ["mnist"]
        digit = facts["digits"][4]
        image = torch.tensor(digit["image"]).view(1, 1, 28, 28) / 255
        torch.testing.assert_close(torch.tensor(digit["code"]), moved.encode(image).flatten(), rtol=0, atol=1e-4)


def test_a_model_that_the_browser_cannot_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="preset 'sparse'"):
        web_export.write(load_pretrained("mnist-dense"), "mnist", tmp_path)


@pytest.mark.parametrize("name, system, dataset", movable.models())
def test_the_files_of_the_website_are_made_of_the_weights_that_ship(name, system, dataset):
    """After a retraining, and for a new system: python -m capsnb web."""
    model, facts = movable.CHOICES[system].load(dataset), json.loads((SHIPPED / f"{name}.json").read_text("utf-8"))
    assert [*facts["systems"]] == [*movable.CHOICES]
    assert facts["files"]["decoder"]["bytes"] <= 3.2e6
    for part, tensors in web_export.parts(model, facts).items():
        content, layout = packing.pack(tensors)
        shipped = (SHIPPED / f"{name}.{part}.bin").read_bytes()
        assert facts["files"][part]["tensors"] == layout and len(shipped) == len(content)
        for tensor, entry in layout.items():
            exact = "scales" if tensor == "filters2" else "offset"  # its whole numbers may round otherwise elsewhere
            end = entry["offset"] + entry["bytes"]
            assert shipped[entry[exact] : end] == content[entry[exact] : end], tensor
    code = torch.tensor([digit["code"] for digit in facts["digits"]]).view(20, *model.poses.mean.shape)
    images = torch.tensor([digit["image"] for digit in facts["digits"]]).view(20, 1, 28, 28) / 255
    torch.testing.assert_close(model.encode(images), code, rtol=0, atol=1e-4)


def test_the_command_writes_all_files(tmp_path, capsys, small, small_networks, monkeypatch):
    experts = movable.CHOICES[movable.EXPERTS]._replace(load=lambda dataset: small)
    capsnet = movable.Choice("CapsNet", lambda dataset: small_networks["capsnet"][1])
    monkeypatch.setattr(movable, "CHOICES", {movable.EXPERTS: experts, "capsnet": capsnet})
    assert main(["web", "--out", str(tmp_path / "weights")]) == 0
    names = [f"{dataset}.{end}" for dataset in web_export.DATASETS for end in ("decoder.bin", "encoder.bin", "json")]
    names += ["capsnet-mnist.decoder.bin", "capsnet-mnist.json"]
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == sorted(names)
    assert all(name in capsys.readouterr().out for name in names[:1])


def test_the_kernel_in_the_modules_was_compiled_from_the_source_beside_it():
    """After a change of kernel.c: python tools/build_kernel.py."""
    assert f'source = "{build_kernel.fingerprint()}"' in (build_kernel.WEB / "kernel.js").read_text("utf-8")
