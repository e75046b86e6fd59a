"""Numbers in few bits, read back here as weights.js reads them."""

import numpy as np
import pytest
import torch

from capsnb import packing
from capsnb.packing import pack, quantised, restored, shrunk


@pytest.fixture
def tensors(double):
    """Of every kind, sizes that leave gaps between them, magnitudes far apart."""
    sizes = {"origin": (7,), "U.3": (5, 11, 32), "bias": (3,), "W.0": (3, 16), "filters2": (13, 128)}
    return {name: (double(*size).exp() * double(*size)).float() for name, size in sizes.items()}


def unpack(content, layout):
    """The tensors of a weight file, as flat arrays."""

    def numbers(kind, entry, place="offset", share=1):
        return np.frombuffer(content, kind, entry["size"] // share, entry[place]).astype("f4")

    def read(entry):
        if entry["type"].startswith("float"):
            return numbers({"float32": "<f4", "float16": "<f2"}[entry["type"]], entry)
        whole = numbers("i1", entry)
        if entry["type"] == "int9":
            low = np.frombuffer(content, "u1", entry["size"] // 8, entry["bits"])
            whole = 2 * whole + np.unpackbits(low, bitorder="little")
        return whole * numbers("<f2", entry, "scales", entry["group"]).repeat(entry["group"])

    return {name: torch.tensor(read(entry)) for name, entry in layout.items()}


def test_an_exact_file_gives_every_number_back(tensors):
    read = unpack(*pack(tensors, exact=True))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(read[name], tensor.flatten(), rtol=0, atol=0)


@pytest.mark.parametrize("name, bits", [("U.3", 9), ("W.0", 8), ("filters2", 8)])
def test_large_tensors_are_within_half_a_step_of_what_they_were(tensors, name, bits):
    content, layout = pack(tensors)
    assert layout[name]["type"] == f"int{bits}"
    group, wanted = packing.PRECISION[name.split(".")[0]][1], tensors[name].flatten()
    steps = wanted.view(-1, group).abs().amax(1).repeat_interleave(group) / (2 ** (bits - 1) - 1)
    differences = (unpack(content, layout)[name] - wanted).abs() / steps
    assert differences.max() <= 0.5 + 2 ** (bits - 12)  # the step itself is rounded to half precision
    assert differences.max() > 0.4  # or fewer steps would do


@pytest.mark.parametrize("name", ["origin", "bias"])
def test_small_tensors_are_in_half_precision(tensors, name):
    read = unpack(*pack(tensors))
    torch.testing.assert_close(read[name], tensors[name].half().float(), rtol=0, atol=0)


def test_every_tensor_lies_where_its_numbers_can_be_read_and_ends_where_the_layout_says(tensors):
    content, layout = pack(tensors)
    end = 0
    for entry in layout.values():
        assert entry["offset"] % 4 == 0 and end <= entry["offset"] < end + 4
        assert entry.get("scales", 0) % 2 == 0
        end = entry["offset"] + entry["bytes"]
    assert len(content) == end + -end % 4


def test_a_group_of_zeros_stays_zero():
    whole, scales = quantised(torch.zeros(3, 8), 8, 4)
    assert not whole.any() and not scales.any()


def test_with_a_moment_what_the_rows_multiply_is_sent_on_more_exactly(double):
    inputs = double(2000, 16) @ double(16, 128)  # 128 numbers that go together in 16 ways
    rows = double(101, 128).float()
    moment = inputs.T @ inputs / len(inputs)

    def error(*arguments):
        whole, scales = quantised(rows, 8, 64, *arguments)
        step = scales.double().repeat_interleave(64).view(101, 128)
        return ((whole * step - rows) @ inputs.T).square().mean()

    assert error(moment) < 0.2 * error()


def test_a_moment_of_numbers_that_do_not_go_together_changes_nothing(double):
    rows = double(11, 128).float()
    for plain, same in zip(quantised(rows, 8, 64), quantised(rows, 8, 64, 3 * torch.eye(128, dtype=torch.float64))):
        torch.testing.assert_close(plain, same, rtol=0, atol=0)


def test_filters_in_8_bits_come_back_within_half_a_step_of_each_and_the_rest_in_16_bits(double):
    tensors = {"filters": double(5, 3, 7, 7).float(), "bias": double(11).float(), "count": torch.tensor(30_001)}
    tensors["filters"][2, 1] *= 1000
    small = shrunk(tensors, ("filters",))
    kinds = {"filters": torch.int8, "filters.scales": torch.float16, "bias": torch.float16, "count": torch.int64}
    assert {name: tensor.dtype for name, tensor in small.items()} == kinds and small["filters.scales"].shape == (15,)
    found = restored(small)
    assert found.keys() == tensors.keys() and found["count"] == 30_001
    assert torch.equal(found["bias"], tensors["bias"].half())
    steps = tensors["filters"].abs().amax((2, 3), keepdim=True) / 127
    differences = (found["filters"] - tensors["filters"]).abs() / steps
    assert 0.4 < differences.max() <= 0.5 + 127 * 2**-11  # a scale is rounded to half precision


def test_filters_that_were_stored_are_stored_again_as_they_are(double):
    once = restored(shrunk({"filters": double(5, 3, 7, 7).float()}, ("filters",)))
    again = restored(shrunk(once, ("filters",)))
    assert torch.equal(again["filters"], once["filters"])


def test_filters_of_zeros_are_stored():
    assert not restored(shrunk({"filters": torch.zeros(2, 3, 5, 5)}, ("filters",)))["filters"].any()
