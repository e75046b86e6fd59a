"""routing.c against the plain path of ``route``, in double precision."""

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from capsnb import native, route, squash
from capsnb.routing import route_steps, route_with_agreement

compiled = pytest.mark.skipif(native.compiled(11, 13) is None, reason="there is no C compiler")
both = pytest.mark.parametrize("over", ["upper", "lower"])
SIZES = [(1, 2, 3, 5, 7), (16, 7, 5, 11, 13), (37, 5, 29, 8, 16), (19, 31, 1, 16, 8)]  # B, I, J, d, e


def layer(double, sizes):
    """Lower capsules in single precision, the first of them zero, and weights."""
    images, lower, upper, d, e = sizes
    x = squash(double(images, lower, e)).float()
    x[0, 0] = 0
    return x, double(lower, upper, d, e).float()


def plain(x, W, on=None, **options):
    return route_steps(x.double(), W.double(), on=on, **options)[-1]


@compiled
@both
@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
@pytest.mark.parametrize("sizes", SIZES)
def test_it_routes_as_the_plain_path_does(double, sizes, rounds, over):
    x, W = layer(double, sizes)
    assert native.can_route(x, W, rounds)
    found, expected = (way(x, W, rounds=rounds, over=over) for way in (route_with_agreement, plain))
    for name, value in found._asdict().items():
        assert_close(value.double(), getattr(expected, name), rtol=1e-5, atol=1e-5, msg=name)


@compiled
@both
@pytest.mark.parametrize("sharpness", [0.3, 7.0])
def test_it_routes_with_any_sharpness_as_the_plain_path_does(double, over, sharpness):
    (x, W), options = layer(double, SIZES[2]), {"rounds": 3, "over": over, "sharpness": sharpness}
    assert native.can_route(x, W, 3, sharpness)
    found, expected = (way(x, W, **options) for way in (route_with_agreement, plain))
    for name, value in found._asdict().items():
        assert_close(value.double(), getattr(expected, name), rtol=1e-4, atol=1e-5, msg=name)


@compiled
@both
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e6])
def test_weights_of_any_size_and_many_rounds_give_finite_couplings(double, over, scale):
    x, W = layer(double, SIZES[2])
    found = route(x, scale * W, rounds=25, over=over)
    total = found.coupling.sum({"upper": 2, "lower": 1}[over])
    assert_close(total, torch.ones_like(total))
    assert found.z.isfinite().all()


@compiled
@both
def test_capsules_that_are_off_take_no_part_even_if_all_are(double, rng, over):
    x, W = layer(double, SIZES[2])
    on = torch.rand(x.shape[:2], generator=rng) < 0.5
    on[3] = False
    found, expected = (way(x, W, rounds=3, over=over, on=on) for way in (route_with_agreement, plain))
    for name, value in found._asdict().items():
        assert_close(value.double(), getattr(expected, name), rtol=1e-5, atol=1e-5, msg=name)
    assert (found.coupling[3] == 0).all() and (found.z[3] == 0).all()


@compiled
def test_weights_in_any_memory_layout_give_the_same(double):
    x, W = layer(double, SIZES[1])
    other = W.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not other.is_contiguous()
    assert_close(route(x, other), route(x, W), rtol=0, atol=0)


@compiled
def test_the_number_of_threads_changes_nothing(double):
    x, W = layer(double, SIZES[2])
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(route(x, W))
    torch.set_num_threads(before)
    assert_close(found[1:], found[:1] * 2, rtol=0, atol=0)


@both
def test_what_the_compiled_loops_cannot_bound_takes_the_plain_path(double, over):
    """The inner agreement, and logits that grow too large."""
    (x, W), options = layer(double, SIZES[2]), {"rounds": 3, "over": over}
    for more in ({"agreement": "inner", "sharpness": 0.3}, {"sharpness": 13.0}):
        found, expected = (way(x, W, **options, **more) for way in (route_with_agreement, plain))
        assert_close(found.coupling.double(), expected.coupling, rtol=1e-3, atol=1e-4)


def test_derivatives_and_other_precisions_and_very_many_rounds_take_the_plain_path(double):
    x, W = layer(double, SIZES[1])
    assert not native.can_route(x.double(), W.double(), 3) and not native.can_route(x, W, 26)
    assert not native.can_route(x, W, 3, 12.1)
    assert not native.can_route(x[:0], W, 3) and not native.can_route(x, W.requires_grad_(), 3)
    (gradient,) = torch.autograd.grad(route(x, W).z.square().sum(), W)
    assert gradient.abs().max() > 0


def test_half_precision_routes_to_two_digits(double):
    x, W = layer(double, SIZES[1])
    found, expected = route(x.bfloat16(), W.bfloat16()), plain(x, W, rounds=3)
    assert found.z.dtype == torch.bfloat16
    assert_close(found.coupling.double(), expected.coupling, rtol=0.05, atol=0.01)
    assert_close(found.z.double(), expected.z, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("variable", [{"CC": "no-such-compiler"}, {"CC": "false"}, {"CAPSNB_NATIVE": "0"}])
def test_without_a_working_compiler_routing_goes_on_by_the_plain_path(variable):
    script = """import torch; from capsnb import native, route
assert not native.can_route(torch.ones(1, 2, 3), torch.ones(2, 3, 5, 3), 3)
print(route(torch.ones(1, 2, 3), torch.ones(2, 3, 5, 3)).coupling[0, 0, 0].item())"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=os.environ | variable, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(1 / 3)


FUSED = """import torch; from capsnb import native
square = lambda x: (x.square() + 1).sum()
print(native.fused(square, torch.ones(3)) is square, native.fused(square, torch.ones(3))(torch.ones(5)).item())"""


@pytest.mark.parametrize("variable", [{"CXX": "false"}, {"CAPSNB_NATIVE": "0"}])
def test_what_cannot_be_fused_stays_as_it_is(variable, tmp_path):
    variable |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FUSED], env=os.environ | variable, capture_output=True, text=True)
    assert done.stdout == "True 10.0\n", done.stderr
    assert ("torch.compile does not work here" in done.stderr) == ("CXX" in variable)
