"""The experiment on unsupervised capsules: what it moves and draws, and its files."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from capsnb import checkpoints
from capsnb.affine_mnist import in_frame
from capsnb.baselines.capsnet import CapsNet, CapsNetSettings
from capsnb.baselines.sparse_capsules import SparseCapsules, SparseCapsulesSettings
from capsnb.sparsity import support
from experiments import affine_mnist, unsupervised_capsules
from experiments.unsupervised_capsules import AMOUNTS, Seen, main, moved, name_of, pictures, read_alone, supports

SMALL = {"channels": 7, "types": 3, "dim": 5, "first_hidden": 11, "second_hidden": 13}
FILES = {
    "sparse": (SparseCapsules, SparseCapsulesSettings(**SMALL, capsules=6)),
    "dense": (SparseCapsules, SparseCapsulesSettings(**SMALL, capsules=6, gamma=0.0)),
    "sparse-frames": (SparseCapsules, SparseCapsulesSettings(**SMALL, capsules=6, size=40, stride=4)),
    "dense-frames": (SparseCapsules, SparseCapsulesSettings(**SMALL, capsules=6, size=40, stride=4, gamma=0.0)),
    "capsnet": (CapsNet, CapsNetSettings(**SMALL)),
}


def network(name):
    torch.manual_seed(3)
    make, settings = FILES[name]
    return make(settings).eval()


def test_every_amount_is_added_to_every_number_of_the_longest_capsule_alone(double):
    capsules = double(2, 3, 5).float()
    found = moved(capsules)
    assert found.shape == (2, 5, 11, 3, 5)
    for image in range(2):
        longest = capsules[image].norm(dim=1).argmax()
        for number in range(5):
            for at, amount in enumerate(AMOUNTS):
                expected = capsules[image].clone()
                expected[longest, number] += amount
                assert_close(found[image, number, at], expected)
    assert AMOUNTS == (-1.0, -0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def test_the_pictures_are_of_all_capsules_of_each_alone_and_of_all_others(digits):
    sparse, images = network("sparse"), digits[0][:3]
    found, capsules = pictures(sparse, images), sparse.encode(images)
    alone, unmasked, without = torch.zeros_like(capsules), torch.zeros_like(capsules), capsules.clone()
    alone[:, 4], unmasked[:, 4], without[:, 4] = capsules[:, 4], sparse.latent(images).capsules[:, 4], 0
    for key, shown, layer in (
        ("whole", found["whole"], capsules),
        ("alone", found["alone"][:, 4], alone),
        ("unmasked", found["unmasked"][:, 4], unmasked),
        ("without", found["without"][:, 4], without),
        ("moved", found["moved"][:, 2, 5], capsules),
    ):
        assert_close(shown.float() / 255, sparse.decode(layer)[:, 0], atol=2.1e-3, rtol=0, msg=key)
    assert found["alone"].shape == (3, 6, 28, 28) and found["moved"].shape == (3, 5, 11, 28, 28)


def test_a_capsule_is_read_by_what_it_draws_alone_and_unmasked(digits, monkeypatch):
    sparse, (images, labels) = network("sparse"), [part[:7] for part in digits]
    latent, asked = sparse.latent(images).capsules, []

    class Judge:
        """Knows the class of the first j drawings of capsule j."""

        def probabilities(self, drawn):
            layer = torch.zeros_like(latent)
            layer[:, len(asked)] = latent[:, len(asked)]
            assert_close(drawn, sparse.decode(layer))
            asked.append(drawn)
            return torch.nn.functional.one_hot((labels + (torch.arange(7) >= len(asked) - 1)) % 10, 10)

    monkeypatch.setattr(unsupervised_capsules, "load_classifier", Judge)
    assert read_alone(sparse, images, labels) == pytest.approx([j / 7 for j in range(6)])


@pytest.mark.parametrize("name", FILES)
def test_names_and_supports_are_those_of_the_network(name, digits):
    made = network(name)
    images = in_frame(digits[0][:3], made.settings.size)
    assert name_of(made) == name
    assert_close(supports(made, images), support(made.route(images).coupling.detach(), 36))


@pytest.mark.parametrize("name, where", [("sparse", "mass"), ("sparse-frames", "frame"), ("dense-frames", "frame")])
def test_a_table_is_of_whole_frames_or_of_windows_about_the_mass_as_the_network_sees(name, where, few, monkeypatch):
    made = network(name)
    monkeypatch.setattr(unsupervised_capsules, "measure", lambda code, sets: {key: code(key) for key in sets})
    seen = Seen(made, Namespace(quick=True, seed=0))
    asked = seen.table_1()
    for key in ("affine", "affine test", "plain"):
        images = seen.views.images(where, key)
        assert_close(asked["unmasked"][key], made.latent(images).capsules)
        assert_close(asked.get("masked", asked["unmasked"])[key], made.encode(images))
        drawn = made.decode(made.encode(images))
        assert_close(seen.reconstructions(key), drawn)
        assert seen.error(key) == pytest.approx((drawn - images).square().sum().item() / len(images), rel=1e-5)


@pytest.fixture
def few(monkeypatch, digits):
    """Few digits."""
    part = {"train": slice(0, 59), "test": slice(59, 146)}
    for module in (affine_mnist, unsupervised_capsules):
        monkeypatch.setattr(module.data, "load", lambda name, split, sample: [each[part[split]] for each in digits])
    monkeypatch.setattr(affine_mnist, "QUICK_CLASSIFIED", 53)
    monkeypatch.setattr(affine_mnist, "QUICK_ALONE", 7)
    monkeypatch.setattr(affine_mnist, "FEW", (31,))


@pytest.fixture
def weights(tmp_path, few):
    """Files of small networks, with what stands for their metrics, and few digits."""
    for name, (_, settings) in FILES.items():
        system = "capsnet" if name == "capsnet" else "sparse-capsules"
        facts = {"settings": vars(replace(settings)), "system": system}
        checkpoints.write(tmp_path / f"{name}.safetensors", network(name).state_dict(), **facts)
        if "frames" not in name:
            checkpoints.write_json(tmp_path / f"{name}.metrics.json", {"test": {"purity": 0.5}})
    return [str(tmp_path / f"{name}.safetensors") for name in FILES]


def test_a_quick_run_writes_an_entry_for_every_file_and_a_second_one_only_what_lacks(weights, monkeypatch, tmp_path):
    out = tmp_path / "found.json"
    main([*weights, "--quick", "--out", str(out)])
    entries = json.loads(out.read_text())["entries"]
    assert list(entries) == list(FILES) and set(entries["capsnet"]) == {"weights", "support"}
    for size in ("", "-frames"):
        assert set(entries["sparse" + size]["table_1"]) == {"masked", "unmasked"}
        assert set(entries["dense" + size]["table_1"]) == {"unmasked"}
    masked, unmasked = (entries["sparse"]["table_1"][way] for way in ("masked", "unmasked"))
    assert masked["numbers"] == unmasked["numbers"] == 30 and masked["gamma"] != unmasked["gamma"]
    assert entries["dense"]["metrics"] == {"purity": 0.5} and len(entries["dense"]["read_alone"]) == 6
    arrays = checkpoints.read(out.with_suffix(".safetensors"))[0]
    keys = ("whole", "alone", "unmasked", "without", "moved")
    parts = {f"{name}/{key}" for name in ("sparse", "dense") for key in keys}
    parts |= {f"{name}-frames/{key}" for name in ("sparse", "dense") for key in ("frames", "whole")}
    assert arrays["sparse-frames/frames"].shape == arrays["dense-frames/whole"].shape == (12, 40, 40)
    assert set(arrays) == parts | {"images"} and len(arrays["images"]) == len(arrays["dense/whole"]) == 4
    monkeypatch.setattr(unsupervised_capsules, "entry", None)
    main([*weights, "--quick", "--out", str(out)])
    assert json.loads(out.read_text())["entries"] == entries
