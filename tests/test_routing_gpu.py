"""The kernels for GPUs: run by an interpreter against the plain way, translated for real GPUs, chosen where they fit.

No test here needs a GPU. On one, tests/test_routing.py compares what ``route`` gives there with the processor.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import kernels
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from capsnb import native, routing, routing_gpu

needs_triton = pytest.mark.skipif(routing_gpu.triton is None, reason="Triton is not installed")
SIZES = [(1, 2, 3, 5, 7), (9, 7, 5, 11, 3), (2, 19, 20, 16, 8), (2, 17, 1, 16, 5)]  # B, I, J, d, e


def process(**options):
    """A process that has loaded nothing yet."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), **options)


@pytest.fixture(scope="module")
def apart():
    """Call a function in a process of its own."""
    with process() as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture(scope="module")
def interpreted():
    """``kernels.differences``, run by the interpreter."""
    with process(initializer=kernels.interpret) as pool:
        yield lambda *arguments: pool.submit(kernels.differences, *arguments).result()


@needs_triton
@pytest.mark.parametrize("over", ["upper", "lower"])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_kernels_route_as_the_plain_way_does(sizes, rounds, over, interpreted):
    assert max(interpreted(sizes, rounds, over, 1.7, torch.float64)) < 1e-10
    assert max(interpreted(sizes, rounds, over, 1.7, torch.float32)) < 1e-5


@needs_triton
@pytest.mark.parametrize("capability", [75, 80, 90])  # T4; A100; H100 and H200
@pytest.mark.parametrize("over_upper", [True, False])
def test_the_kernels_are_translated_for_gpus_of_three_generations(capability, over_upper, apart):
    for code, shared in apart(kernels.translated, capability, over_upper).values():
        assert code > 0 and shared <= 48 * 1024  # what every GPU has


@needs_triton
def test_only_what_the_kernels_can_do_is_left_to_them(monkeypatch):
    monkeypatch.setattr(routing_gpu, "_works", lambda device: True)
    with FakeTensorMode(allow_non_fake_inputs=True):  # of tensors that lie on a GPU as far as anybody can see

        def can_route(*options, images=3, lower=7, upper=20, **kinds):
            shapes = (images, lower, 8), (lower, upper, 16, 8)
            return routing_gpu.can_route(*(torch.empty(shape, **kinds, device="cuda") for shape in shapes), *options)

        assert can_route(3) and can_route(3, 12.0) and can_route(3, upper=256)
        assert not can_route(3, 12.1) and not can_route(26) and not can_route(3, upper=257)
        assert can_route(3, images=4096, lower=576, upper=200) and not can_route(3, images=4096, lower=5760, upper=200)
        assert not can_route(3, images=0) and not can_route(3, dtype=torch.float64)
        assert not can_route(3, requires_grad=True)
    assert not routing_gpu.can_route(torch.empty(3, 7, 8), torch.empty(7, 20, 16, 8), 3)


@needs_triton
def test_kernels_that_fail_on_a_gpu_or_disagree_leave_it_to_the_plain_way(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no kernel image is available")

    def disagrees(x, on, W, *options):
        return x.new_zeros(5, 37, 11), x.new_zeros(5, 11, 16), x.new_zeros(5, 11)

    for route, message in ((fails, "no kernel image is available"), (disagrees, "Tensor-likes are not close")):
        monkeypatch.setattr(routing_gpu, "route", route)
        with pytest.warns(UserWarning, match=f"routing takes the plain way on cpu: {message}"):
            assert not routing_gpu._works.__wrapped__(torch.device("cpu"))


def test_every_kind_of_device_has_its_way():
    assert routing.without_votes(torch.device("cuda")) is routing_gpu
    assert routing.without_votes(torch.device("cpu")) is native
