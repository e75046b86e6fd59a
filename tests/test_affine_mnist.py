"""Affine digits: what their maps do, that no ink is lost, that what is regenerated says so, and the original files."""

import math
import re

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch.nn import functional as F
from torch.testing import assert_close

from capsnb import data
from capsnb.affine import linear_maps
from capsnb.affine_mnist import draw_maps, in_frame, load_original, place, protocols, regenerate, room, transform


@pytest.fixture(scope="module")
def digits():
    """101 digits of the shipped sample."""
    return data.load("mnist", "train", sample=True)[0][:101].double()


@pytest.fixture
def dot():
    """A grey disc around row 11, column 15, counted from 0, with sharp ends."""
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    disc = torch.exp(-((rows - 11) ** 2 + (columns - 15) ** 2) / 8)
    return disc.where(disc > 1e-3, 0)[None, None].double()


def centre(images):
    """The centre of mass of each image, in pixels from the middle of the picture: across, down."""
    axis = torch.arange(images.shape[2]).double() - (images.shape[2] - 1) / 2
    mass = images.sum((1, 2, 3))
    return torch.stack([(images.sum((1, 2)) * axis).sum(1) / mass, (images.sum((1, 3)) * axis).sum(1) / mass], dim=1)


def identity(count):
    return torch.eye(2, dtype=torch.float64).expand(count, 2, 2), torch.zeros(count, 2, dtype=torch.float64)


def labels_of(images):
    return torch.arange(len(images)) % 10


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_a_linear_map_stretches_and_slants_then_turns():
    angle, shear, across, down = 0.3, -0.15, 1.1, 0.9
    expected = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    expected = expected @ np.array([[across, shear], [0, down]])
    found = linear_maps(*(torch.tensor([value], dtype=torch.float64) for value in (angle, shear, across, down)))
    assert_close(found[0], torch.from_numpy(expected))


def test_the_parameters_found_in_the_maps_fill_the_published_ranges_evenly(rng):
    maps = draw_maps(torch.rand(4001, 4, generator=rng, dtype=torch.float64))
    angle = torch.atan2(maps[:, 1, 0], maps[:, 0, 0])
    upper = linear_maps(-angle, *(torch.full_like(angle, value) for value in (0, 1, 1))) @ maps
    assert_close(upper[:, 1, 0], torch.zeros(4001, dtype=torch.float64))
    found = {
        (-20, 20): torch.rad2deg(angle),
        (-0.2, 0.2): upper[:, 0, 1],
        (0.8, 1.2): upper[:, 0, 0],
        (0.8, 1.2, "down"): upper[:, 1, 1],
    }
    for (low, high, *_), values in found.items():
        assert low <= values.min() and values.max() <= high
        shares = torch.histc((values - low) / (high - low), bins=5, min=0, max=1) / len(values)
        assert_close(shares, torch.full_like(shares, 0.2), rtol=0, atol=0.03)
    assert torch.corrcoef(torch.stack(list(found.values()))).fill_diagonal_(0).abs().max() < 0.06


def test_the_identity_gives_the_digit_in_the_middle_of_the_frame(digits):
    assert_close(transform(digits, *identity(101)), F.pad(digits, [6] * 4))


def test_the_centre_of_mass_goes_where_map_and_move_send_it(dot, rng):
    maps = draw_maps(torch.rand(53, 4, generator=rng, dtype=torch.float64))
    moves = 10 * torch.rand(53, 2, generator=rng, dtype=torch.float64) - 5
    expected = (maps @ centre(dot)[0]) + moves
    assert_close(centre(transform(dot.expand(53, -1, -1, -1), maps, moves)), expected, rtol=0, atol=0.04)


def test_ink_grows_as_the_determinant(dot, rng):
    maps = draw_maps(torch.rand(53, 4, generator=rng, dtype=torch.float64))
    ink = transform(dot.expand(53, -1, -1, -1), maps, identity(53)[1]).sum((1, 2, 3))
    assert_close(ink / dot.sum(), torch.linalg.det(maps), rtol=0.012, atol=0)


def test_at_both_ends_of_its_room_a_digit_keeps_all_its_ink_and_beyond_them_it_does_not(digits, rng):
    maps = draw_maps(torch.rand(101, 4, generator=rng, dtype=torch.float64))

    def ink(moves):
        return transform(digits, maps, moves).sum((1, 2, 3))

    low, high = room(digits, maps)
    for end, step in ((low, 1), (high, -1)):
        assert_close(ink(end), ink(end + step))
        for axis in torch.eye(2, dtype=torch.float64):
            assert (ink(end - 3 * step * axis) < ink(end) - 1e-3).all()


def test_regenerated_digits_lie_anywhere_in_their_room(dot):
    frames = regenerate(dot.expand(2003, -1, -1, -1), torch.zeros(2003).long(), rng=seeded(3)).images
    low, high = room(dot, identity(1)[0])
    assert_close(centre(frames).std(0), (high - low)[0] / math.sqrt(12), rtol=0.06, atol=0)
    assert_close(centre(frames).mean(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=0.5)
    assert abs(torch.corrcoef(centre(frames).T)[0, 1]) < 0.1


def test_the_seed_decides_the_frames_and_the_first_do_not_depend_on_how_many_follow(dot):
    images = dot.expand(1013, -1, -1, -1)
    many, again, other = (regenerate(images, labels_of(images), rng=seeded(seed)).images for seed in (1, 1, 2))
    assert torch.equal(many, again) and not torch.equal(many, other)
    assert_close(regenerate(images[:7], labels_of(images[:7]), rng=seeded(1)).images, many[:7])
    assert len({frame.sum().item() for frame in many}) == 1013


@pytest.mark.parametrize("image", [torch.zeros(1, 28, 28), torch.ones(1, 28, 28)], ids=["no ink", "too much ink"])
def test_an_image_that_cannot_be_kept_in_the_frame_is_refused(digits, image):
    images = torch.cat([digits[:5], image[None].double().expand(97, -1, -1, -1)])
    with pytest.raises(ValueError, match="ink that fits into 40 x 40"):
        regenerate(images, labels_of(images), rng=seeded(0))


def test_placed_digits_are_moved_by_whole_pixels_to_every_place_of_the_frame(digits):
    placed = place(digits.repeat(3, 1, 1, 1), labels_of(torch.zeros(303)), rng=seeded(5)).images
    seen = set()
    for row, frame in enumerate(placed):
        windows = [(i, j) for i in range(13) for j in range(13) if _holds(frame, digits[row % 101], i, j)]
        assert len(windows) == 1
        seen.update(windows)
    assert {i for i, _ in seen} == {j for _, j in seen} == set(range(13)) and len(seen) > 120


def _holds(frame, digit, top, left):
    """Whether ``frame`` is ``digit`` at row ``top`` and column ``left``, and else empty."""
    return torch.equal(frame[:, top : top + 28, left : left + 28], digit) and frame.sum().isclose(digit.sum())


@pytest.fixture
def split(digits):
    return lambda start, stop: (digits[start:stop], torch.arange(start, stop) % 10)


def test_the_protocols_are_those_of_the_papers_table(split):
    found = protocols(split(0, 31), split(31, 48), rng=seeded(2))
    parts = {name: (p.encoder, p.classifier, p.test) for name, p in found.items()}
    assert [len(part.images) for name in ("mnist", "a", "b") for part in parts[name]] == [31, 31, 17] * 3
    used = {name: [part.is_regenerated for part in three] for name, three in parts.items()}
    assert used == {"mnist": [False] * 3, "a": [False, True, True], "b": [False, False, True]}
    assert found["a"].test is found["b"].test and found["mnist"].classifier is found["b"].classifier
    assert {p.encoder.name for p in found.values()} == {"MNIST placed at random in 40 x 40"}
    assert_close(found["b"].classifier.images, F.pad(split(0, 31)[0], [6] * 4))
    assert_close(found["mnist"].test.images, F.pad(split(31, 48)[0], [6] * 4))
    assert found["a"].classifier.labels.tolist() == [row % 10 for row in range(31)]
    assert found["a"].test.labels.tolist() == found["mnist"].test.labels.tolist() == [row % 10 for row in range(31, 48)]


def test_whatever_holds_regenerated_digits_says_so_in_its_name(split):
    for name, protocol in protocols(split(0, 3), split(3, 5), rng=seeded(2)).items():
        assert ("regenerated, not the original files" in protocol.name) == (name != "mnist")


@pytest.fixture
def originals(tmp_path, rng):
    """A folder as affNIST's archives leave it, with files of seven images, and what is in them by folder and number."""
    content = {}
    for folder, numbers in {"training_batches": (1, 2, 3), "test_batches": (1,)}.items():
        (tmp_path / folder).mkdir()
        for number in numbers:
            images = torch.randint(256, (7, 40, 40), generator=rng, dtype=torch.uint8).numpy()
            labels = torch.randint(10, (7,), generator=rng).numpy()
            savemat(tmp_path / folder / f"{number}.mat", {"affNISTdata": record(images, labels)})
            content[folder, number] = images, labels
    return tmp_path, content


def record(images, labels):
    """The struct of one file of affNIST: everything has a column for each image."""
    count = len(images)
    return {
        "affine_matrix": np.zeros((3, 3, count)),
        "human_readable_transform": np.zeros((6, count)),
        "image": np.stack([[image[row, column] for row in range(40) for column in range(40)] for image in images], 1),
        "label_one_of_n": np.eye(10, dtype=np.uint8)[labels].T,
        "label_int": labels[None].astype(np.uint8),
    }


def test_the_original_files_are_read_in_the_order_of_their_numbers(originals):
    folder, content = originals
    found = load_original(folder, "train", batches=2)
    images, labels = (np.concatenate(each) for each in zip(*(content["training_batches", n] for n in (1, 2))))
    assert_close(found.images, torch.from_numpy(images)[:, None].float() / 255)
    assert found.labels.tolist() == labels.tolist()
    assert found.name == "affNIST (the original files)" and not found.is_regenerated


def test_the_folder_of_training_and_validation_files_will_do(originals):
    folder, content = originals
    (folder / "training_batches").rename(folder / "training_and_validation_batches")
    assert load_original(folder, "train").labels.tolist() == content["training_batches", 1][1].tolist()


def test_with_the_original_files_nothing_is_regenerated(originals, split):
    folder, content = originals
    found = protocols(split(0, 31), split(31, 48), rng=seeded(2), originals=folder)
    assert found["a"].classifier.labels.tolist() == content["training_batches", 1][1].tolist()
    assert found["b"].test.labels.tolist() == content["test_batches", 1][1].tolist()
    assert not any("regenerated" in protocol.name for protocol in found.values())


def test_missing_original_files_are_named(originals):
    folder, _ = originals
    with pytest.raises(FileNotFoundError, match=r"test_batches.2\.mat is missing"):
        load_original(folder, "test", batches=2)
    with pytest.raises(FileNotFoundError, match="no folder training_batches or training_and_validation_batches"):
        load_original(folder / "training_batches", "train")
    with pytest.raises(ValueError, match="unknown split 'valid'"):
        load_original(folder, "valid")


def test_files_of_another_kind_are_refused(originals):
    path = originals[0] / "test_batches" / "1.mat"
    whole = path.read_bytes()
    other = {"affNISTdata": np.zeros((5, 3))}, {"affNISTdata": {"image": np.zeros((1600, 3))}}, {"data": np.zeros(3)}
    for content in (b"", b"not a Matlab file", whole[:700], *other):
        path.write_bytes(content) if isinstance(content, bytes) else savemat(path, content)
        with pytest.raises(ValueError, match=re.escape(f"{path} is not one of affNIST's files")):
            load_original(originals[0], "test")
    savemat(path, {"affNISTdata": {"image": np.zeros((784, 3)), "label_int": np.zeros((1, 3))}})
    with pytest.raises(ValueError, match=r"\(784, 3\) and 3 labels; expected \[1600, count\]"):
        load_original(originals[0], "test")


def test_a_frame_is_empty_about_the_image_and_larger_images_stay_as_they_are(double):
    images = double(3, 1, 28, 28)
    found = in_frame(images, 40)
    assert_close(found[:, :, 6:34, 6:34], images)
    assert found.shape == (3, 1, 40, 40) and found.ne(0).sum() == images.ne(0).sum()
    assert_close(in_frame(images, 20), images)
