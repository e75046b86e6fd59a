"""smallNORB: tiny files written in its real format, and what happens where they are missing or damaged."""

import gzip
import struct

import pytest
import torch
from torch.testing import assert_close

from capsnb import data, small_norb

PREFIXES = {
    "train": "smallnorb-5x46789x9x18x6x2x96x96-training",
    "test": "smallnorb-5x01235x9x18x6x2x96x96-testing",
}
BYTES, INTEGERS = 0x1E3D4C55, 0x1E3D4C54


def matrix(magic, sizes, values):
    """A file of the format: magic number, dimensions, at least three sizes, entries; all numbers lowest byte first."""
    header = [magic, len(sizes), *sizes, *[1] * (3 - len(sizes))]
    entry = "B" if magic == BYTES else "i"
    return struct.pack(f"<{len(header)}I", *header) + struct.pack(f"<{len(values)}{entry}", *values)


def contents(pairs, labels, info):
    return {
        "dat": matrix(BYTES, pairs.shape, pairs.flatten().tolist()),
        "cat": matrix(INTEGERS, labels.shape, labels.tolist()),
        "info": matrix(INTEGERS, info.shape, info.flatten().tolist()),
    }


def write(folder, split, files, packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for kind, content in files.items():
        path = folder / f"{PREFIXES[split]}-{kind}.mat{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.fixture
def toys(rng, monkeypatch):
    """Pairs of pictures of 6 x 6 pixels, classes and facts, by split."""
    monkeypatch.delenv("CAPSNB_QUICK", raising=False)
    return {
        split: (
            torch.randint(256, (count, 2, 6, 6), generator=rng, dtype=torch.uint8),
            torch.randint(5, (count,), generator=rng),
            torch.randint(-3, 300, (count, 4), generator=rng),
        )
        for split, count in {"train": 7, "test": 3}.items()
    }


def test_the_header_is_as_the_format_has_it():
    """The first bytes of the real files: 55 4c 3d 1e, four dimensions; 54 4c 3d 1e, one dimension and two ones."""
    assert matrix(BYTES, (1, 1, 1, 2), [3, 255]).hex() == "554c3d1e04000000" + "01000000" * 3 + "02000000" + "03ff"
    assert matrix(INTEGERS, (1,), [-2]).hex() == "544c3d1e01000000" + "01000000" * 3 + "feffffff"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_is_read_from_its_three_files(split, packed, toys, tmp_path):
    for name, parts in toys.items():
        write(tmp_path, name, contents(*parts), packed)
    for found, expected in zip(small_norb.read(tmp_path, split), toys[split]):
        assert torch.equal(found, expected) and found.dtype == expected.dtype


@pytest.mark.parametrize("quick", ["0", "1"])
def test_it_is_a_named_data_set_whose_images_are_single_pictures_at_half_their_size(toys, tmp_path, monkeypatch, quick):
    monkeypatch.setenv("CAPSNB_DATA", str(tmp_path))
    monkeypatch.setenv("CAPSNB_QUICK", quick)
    monkeypatch.setattr(small_norb, "_PART", 2)
    pairs, classes, _ = toys["train"]
    write(tmp_path / "small-norb", "train", contents(*toys["train"]))
    images, labels = data.load("small-norb", "train")
    assert images.shape == (14, 1, 3, 3)
    for n in range(14):
        for y in range(3):
            for x in range(3):
                square = pairs[n // 2, n % 2, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].double()
                assert_close(images[n, 0, y, x].double(), square.mean() / 255, rtol=1e-6, atol=1e-6)
    assert labels.tolist() == [label for label in classes.tolist() for _ in range(2)]


def test_missing_files_are_named_with_the_folder_they_belong_in(toys, tmp_path, monkeypatch):
    monkeypatch.setenv("CAPSNB_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="small-norb has no smallnorb.*-training-dat.mat; put .* six") as raised:
        data.load("small-norb", "train")
    for prefix in PREFIXES.values():
        for kind in ("dat", "cat", "info"):
            assert f"{prefix}-{kind}.mat" in str(raised.value)
    folder = write(tmp_path / "small-norb", "test", contents(*toys["test"]))
    (folder / f"{PREFIXES['test']}-info.mat").unlink()
    with pytest.raises(FileNotFoundError, match="has no smallnorb-.*-testing-info.mat"):
        data.load("small-norb", "test")


def test_no_sample_of_it_ships():
    with pytest.raises(ValueError, match="no sample of small-norb ships"):
        data.load("small-norb", "train", sample=True)


DAMAGES = {
    "empty": lambda content: b"",
    "cut in the header": lambda content: content[:14],
    "cut in the sizes": lambda content: content[:22],
    "cut in the entries": lambda content: content[:-1],
    "too long": lambda content: content + b"\0",
    "another kind": lambda content: b"\x51" + content[1:],
    "highest byte first": lambda content: content[3::-1] + content[4:],
    "too many dimensions": lambda content: content[:4] + b"\xff" * 4 + content[8:],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_file_is_named_with_the_remedy(damage, packed, toys, tmp_path):
    files = contents(*toys["train"])
    write(tmp_path, "train", files | {"dat": DAMAGES[damage](files["dat"])}, packed)
    with pytest.raises(ValueError, match="training-dat.mat.* is not a complete matrix of bytes .*; fetch it again"):
        small_norb.read(tmp_path, "train")


PACKED_DAMAGES = [lambda content: content[:-9], lambda content: b"none", lambda content: content[:10] + b"\xff"]


@pytest.mark.parametrize("damage", PACKED_DAMAGES, ids=["cut", "not gzip", "invalid block"])
def test_a_damaged_gzip_file_is_named_with_the_remedy(damage, toys, tmp_path):
    path = write(tmp_path, "train", contents(*toys["train"]), packed=True) / f"{PREFIXES['train']}-cat.mat.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="training-cat.mat.gz is not a complete matrix"):
        small_norb.read(tmp_path, "train")


def test_files_that_do_not_belong_together_are_refused(toys, tmp_path):
    pairs, labels, info = toys["train"]
    for parts in [(pairs[:5], labels, info), (pairs[:, :1], labels, info), (pairs, labels, info[:, :3])]:
        with pytest.raises(ValueError, match="not pairs, classes and 4 facts for each"):
            small_norb.read(write(tmp_path, "train", contents(*parts)), "train")


def test_classes_and_kinds_of_other_files_are_refused(toys, tmp_path):
    pairs, labels, info = toys["train"]
    for other in (5, -1):
        changed = labels.clone()
        changed[3] = other
        with pytest.raises(ValueError, match="other entries than bytes and classes 0 to 4"):
            small_norb.read(write(tmp_path, "train", contents(pairs, changed, info)), "train")
    files = contents(*toys["train"]) | {"dat": matrix(INTEGERS, pairs.shape, pairs.flatten().tolist())}
    with pytest.raises(ValueError, match="other entries than bytes"):
        small_norb.read(write(tmp_path, "train", files), "train")
