"""Data sets: torchvision's, a folder of IDX files, the shipped sample, and what happens without a network."""

import gzip
import re
import urllib.error

import pytest
import torch
from make_samples import idx
from torch.testing import assert_close
from torchvision import datasets

from capsnb import data


@pytest.fixture
def splits(rng):
    """Eleven training and seven test images of bytes, with labels."""
    sizes = {"train": 11, "test": 7}
    return {
        split: (
            torch.randint(256, (size, 28, 28), generator=rng, dtype=torch.uint8),
            torch.randint(10, (size,), generator=rng, dtype=torch.uint8),
        )
        for split, size in sizes.items()
    }


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty data folder, and torchvision's downloads failing as they do without a network."""

    def unreachable(*arguments, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", unreachable)
    monkeypatch.setenv("CAPSNB_DATA", str(tmp_path / "cache"))
    monkeypatch.delenv("CAPSNB_QUICK", raising=False)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_of_four_idx_files_is_a_data_set(split, packed, splits, tmp_path, write_folder):
    images, labels = data.load(str(write_folder(tmp_path / "mine", splits, packed=packed)), split)
    assert_close(images, splits[split][0][:, None] / 255)
    assert labels.tolist() == splits[split][1].tolist()


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_named_data_sets_are_read_from_the_folder_in_the_environment(
    name, folder, splits, tmp_path, monkeypatch, no_network, write_folder
):
    monkeypatch.setenv("CAPSNB_DATA", str(tmp_path))
    write_folder(tmp_path / folder / "raw", splits)
    for split in ("train", "test"):
        images, labels = data.load(name, split, sample=False)
        assert_close(images, splits[split][0][:, None] / 255)
        assert labels.tolist() == splits[split][1].tolist()


def test_without_the_environment_variable_data_lie_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("CAPSNB_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.root() == tmp_path / ".cache" / "capsnb"
    monkeypatch.setenv("CAPSNB_DATA", "~/elsewhere")
    assert data.root() == tmp_path / "elsewhere"


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_shipped_sample_has_100_images_of_every_class_in_both_splits(name, no_network):
    for split in ("train", "test"):
        images, labels = data.load(name, split, sample=True)
        assert images.shape == (1000, 1, 28, 28)
        assert torch.bincount(labels).tolist() == [100] * 10
        assert images.min() == 0 and images.max() == 1 and 0.05 < images.mean() < 0.4


def test_the_two_splits_and_the_two_data_sets_of_the_sample_differ():
    found = [
        data.load(name, split, sample=True)[0] for name in ("mnist", "fashion-mnist") for split in ("train", "test")
    ]
    pictures = {image.numpy().tobytes() for images in found for image in images}
    assert len(pictures) > 3990


def test_without_a_network_the_sample_is_used_and_one_line_says_so(no_network, capsys):
    images, labels = data.load("mnist", "train")
    printed = capsys.readouterr().out
    assert_close(images, data.load("mnist", "train", sample=True)[0])
    assert len(printed.splitlines()) == 1
    assert re.search(r"mnist .*1,000 train images that ship with capsnb", printed)


def test_torchvisions_own_reports_of_a_failed_download_do_not_add_lines(no_network, monkeypatch, capsys):
    def failing(url, **options):
        print("Failed to download (trying next):")
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", failing)
    data.load("mnist", "test")
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("name, sample", [("kmnist", None), ("mnist", False)])
def test_without_a_network_and_a_sample_the_error_says_what_to_do(name, sample, no_network, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{name} is not in {tmp_path}/cache .*set CAPSNB_DATA to a folder"):
        data.load(name, "train", sample=sample)


def test_a_data_folder_that_cannot_be_made_is_no_traceback(no_network, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CAPSNB_DATA", str(tmp_path / "file" / "below"))
    assert len(data.load("mnist", "train")[0]) == 1000
    with pytest.raises(FileNotFoundError, match="set CAPSNB_DATA"):
        data.load("mnist", "train", sample=False)


def test_quick_mode_takes_the_sample_where_there_is_one(
    no_network, splits, tmp_path, monkeypatch, capsys, write_folder
):
    monkeypatch.setenv("CAPSNB_DATA", str(tmp_path))
    write_folder(tmp_path / "MNIST" / "raw", splits)
    write_folder(tmp_path / "KMNIST" / "raw", splits)
    monkeypatch.setenv("CAPSNB_QUICK", "1")
    assert len(data.load("mnist", "train")[0]) == 1000
    assert len(data.load("mnist", "train", sample=False)[0]) == 11
    assert len(data.load("kmnist", "train")[0]) == 11
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("value, quick", [("1", True), ("yes", True), ("0", False), ("", False), (None, False)])
def test_the_environment_decides_between_full_and_quick(value, quick, monkeypatch):
    monkeypatch.delenv("CAPSNB_QUICK", raising=False)
    if value is not None:
        monkeypatch.setenv("CAPSNB_QUICK", value)
    assert data.is_quick() is quick
    assert data.full_or_quick(full=60_000, quick=500) == (500 if quick else 60_000)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="choose one of mnist, fashion-mnist, kmnist, small-norb, or a folder"):
        data.load("minst", "train")


def test_an_unknown_split_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown split 'validation'; choose 'train' or 'test'"):
        data.load("mnist", "validation")


def test_a_sample_that_does_not_ship_is_not_called_an_unknown_data_set():
    with pytest.raises(ValueError, match="no sample of kmnist ships"):
        data.load("kmnist", "train", sample=True)


def test_a_missing_file_is_named(splits, tmp_path, write_folder):
    (write_folder(tmp_path / "mine", splits) / "t10k-labels-idx1-ubyte").unlink()
    data.load(str(tmp_path / "mine"), "train")
    with pytest.raises(FileNotFoundError, match="mine has no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz"):
        data.load(str(tmp_path / "mine"), "test")


DAMAGES = {
    "empty": lambda content: b"",
    "cut in the header": lambda content: content[:6],
    "cut in the content": lambda content: content[:-100],
    "another kind": lambda content: b"GIF89a" + content,
    "floats": lambda content: content[:2] + b"\x0d" + content[3:],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_idx_file_is_named_with_the_remedy(damage, packed, splits, tmp_path, write_folder):
    folder = write_folder(tmp_path / "mine", splits, packed=packed)
    content = DAMAGES[damage](idx(splits["train"][0]))
    suffix, content = (".gz", gzip.compress(content)) if packed else ("", content)
    (folder / f"train-images-idx3-ubyte{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match="mine/train-images-idx3-ubyte.* is not a complete IDX file .*; fetch it"):
        data.load(str(folder), "train")


@pytest.mark.parametrize("damage", ["cut", "not gzip", "flipped bits", "invalid block"])
def test_a_damaged_gzip_file_is_named_with_the_remedy(damage, splits, tmp_path, write_folder):
    folder = write_folder(tmp_path / "mine", splits, packed=True)
    path = folder / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    damaged = {
        "cut": content[:-50],
        "not gzip": b"no gzip at all",
        "flipped bits": content[:100] + bytes(255 - byte for byte in content[100:200]) + content[200:],
        "invalid block": content[:10] + b"\xff" + content[11:],  # the first byte after the header
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match="is not a complete IDX file .*; fetch it again"):
        data.load(str(folder), "train")


def test_a_damaged_file_of_a_named_data_set_is_an_error_and_not_replaced_by_the_sample(
    splits, tmp_path, monkeypatch, no_network, write_folder
):
    monkeypatch.setenv("CAPSNB_DATA", str(tmp_path))
    folder = write_folder(tmp_path / "MNIST" / "raw", splits)
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a complete IDX file .*; fetch it again"):
        data.load("mnist", "train")


def test_images_of_another_size_or_without_a_label_each_are_refused(splits, tmp_path, write_folder):
    images, labels = splits["train"]
    large = write_folder(tmp_path / "large", {"train": (torch.zeros(11, 32, 32, dtype=torch.uint8), labels)})
    with pytest.raises(ValueError, match=r"\(11, 32, 32\) images and 11 labels; expected 28 x 28"):
        data.load(str(large), "train")
    few = write_folder(tmp_path / "few", {"train": (images, labels[:-1])})
    with pytest.raises(ValueError, match=r"\(11, 28, 28\) images and 10 labels; expected 28 x 28 images and one label"):
        data.load(str(few), "train")


def test_torchvision_downloads_what_is_missing(splits, tmp_path, monkeypatch, write_folder):
    """A stand-in for the download puts the files where torchvision would."""
    monkeypatch.setenv("CAPSNB_DATA", str(tmp_path))
    monkeypatch.delenv("CAPSNB_QUICK", raising=False)
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: write_folder(tmp_path / "MNIST" / "raw", splits))
    assert_close(data.load("mnist", "test")[0], splits["test"][0][:, None] / 255)
