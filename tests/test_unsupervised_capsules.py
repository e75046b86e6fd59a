"""The experiment on unsupervised capsules: what it moves and draws, and its files."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from capsnb import checkpoints
from capsnb.baselines.capsnet import CapsNet, CapsNetSettings
from capsnb.baselines.sparse_capsules import SparseCapsules, SparseCapsulesSettings
from capsnb.sparsity import support
from experiments import affine_mnist, unsupervised_capsules
from experiments.unsupervised_capsules import AMOUNTS, main, moved, name_of, pictures, read_alone, supports

SMALL = {"channels": 7, "types": 3, "dim": 5, "first_hidden": 11, "second_hidden": 13}
FILES = {
    "sparse": (SparseCapsules, SparseCapsulesSettings(**SMALL, capsules=6)),
    "dense": (SparseCapsules, SparseCapsulesSettings(**SMALL, capsules=6, gamma=0.0)),
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
    made, images = network(name), digits[0][:3]
    assert name_of(made) == name
    assert_close(supports(made, images), support(made.route(images).coupling.detach(), 36))


@pytest.fixture
def weights(tmp_path, monkeypatch, digits):
    """Files of small networks, with what stands for their metrics, and few digits."""
    part = {"train": slice(0, 59), "test": slice(59, 146)}
    for module in (affine_mnist, unsupervised_capsules):
        monkeypatch.setattr(module.data, "load", lambda name, split, sample: [each[part[split]] for each in digits])
    monkeypatch.setattr(affine_mnist, "QUICK_CLASSIFIED", 53)
    monkeypatch.setattr(affine_mnist, "QUICK_ALONE", 7)
    monkeypatch.setattr(affine_mnist, "FEW", (31,))
    for name, (_, settings) in FILES.items():
        system = "capsnet" if name == "capsnet" else "sparse-capsules"
        facts = {"settings": vars(replace(settings)), "system": system}
        checkpoints.write(tmp_path / f"{name}.safetensors", network(name).state_dict(), **facts)
        checkpoints.write_json(tmp_path / f"{name}.metrics.json", {"test": {"purity": 0.5}})
    return [str(tmp_path / f"{name}.safetensors") for name in FILES]


def test_a_quick_run_writes_an_entry_for_every_file_and_a_second_one_only_what_lacks(weights, monkeypatch, tmp_path):
    out = tmp_path / "found.json"
    main([*weights, "--quick", "--out", str(out)])
    entries = json.loads(out.read_text())["entries"]
    assert list(entries) == ["sparse", "dense", "capsnet"] and set(entries["capsnet"]) == {"weights", "support"}
    assert [set(entries[name]["table_1"]) for name in ("sparse", "dense")] == [{"masked", "unmasked"}, {"unmasked"}]
    masked, unmasked = (entries["sparse"]["table_1"][way] for way in ("masked", "unmasked"))
    assert masked["numbers"] == unmasked["numbers"] == 30 and masked["gamma"] != unmasked["gamma"]
    assert entries["dense"]["metrics"] == {"purity": 0.5} and len(entries["dense"]["read_alone"]) == 6
    arrays = checkpoints.read(out.with_suffix(".safetensors"))[0]
    keys = ("whole", "alone", "unmasked", "without", "moved")
    parts = {f"{name}/{key}" for name in ("sparse", "dense") for key in keys}
    assert set(arrays) == parts | {"images"} and len(arrays["images"]) == len(arrays["dense/whole"]) == 4
    monkeypatch.setattr(unsupervised_capsules, "entry", None)
    main([*weights, "--quick", "--out", str(out)])
    assert json.loads(out.read_text())["entries"] == entries
