"""Routing by agreement, and the forward and reverse maps."""

import paper
import pytest
import torch
from torch.testing import assert_close

from capsnb import route
from capsnb.capsules import squash
from capsnb.routing import forward_at_once, forward_map, reverse_map, route_steps, route_with_agreement

B, I, J, D, E = 3, 7, 5, 11, 13  # noqa: E741
both = pytest.mark.parametrize("over", ["upper", "lower"])


@pytest.fixture
def layer(double):
    """Lower capsules, one of them zero, and weights."""
    x = squash(double(B, I, E))
    x[1, 2] = 0
    return x, double(I, J, D, E)


@pytest.fixture
def coupling(rng):
    """Couplings of which some are zero: image 1 does not couple to capsule 2 at all."""
    values = torch.rand(B, I, J, generator=rng, dtype=torch.float64)
    values[1, :, 2] = 0
    values[0, 3] = 0
    return values


@both
@pytest.mark.parametrize("agreement, sharpness", [("cosine", 1.0), ("cosine", 7.0), ("inner", 1.0), ("inner", 0.3)])
@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_routing_is_section_2_written_as_loops(layer, over, agreement, sharpness, rounds):
    x, W = layer
    coupling, z = paper.each_image(lambda x: paper.routing(x, W.numpy(), rounds, over, agreement, sharpness), x)
    found = route(x, W, rounds=rounds, over=over, agreement=agreement, sharpness=sharpness)
    assert_close(found.coupling, coupling, rtol=1e-10, atol=1e-10)
    assert_close(found.z, z, rtol=1e-10, atol=1e-10)


def test_three_rounds_over_the_upper_capsules_by_cosine_are_the_default(layer):
    named = route(*layer, rounds=3, over="upper", agreement="cosine", sharpness=1.0)
    assert_close(route(*layer), named, rtol=0, atol=0)


@both
def test_the_couplings_sum_to_1_over_the_layer_that_is_named(layer, over):
    total = route(*layer, over=over).coupling.sum({"upper": 2, "lower": 1}[over])
    assert_close(total, torch.ones_like(total))


@both
def test_images_do_not_see_each_other_however_many_there_are(double, over):
    x, W = squash(double(37, I, E)), double(I, J, D, E)
    together = route_with_agreement(x, W, over=over)
    alone = [route_with_agreement(image[None], W, over=over) for image in x]
    for field, found in together._asdict().items():
        assert_close(found, torch.cat([getattr(state, field) for state in alone]))


@both
@pytest.mark.parametrize("agreement, sharpness", [("cosine", 1.0), ("inner", 0.3)])
def test_the_state_after_every_round_is_that_of_routing_for_so_many_rounds(layer, over, agreement, sharpness):
    options = {"over": over, "agreement": agreement, "sharpness": sharpness}
    states = route_steps(*layer, rounds=5, **options)
    assert len(states) == 5
    for rounds, state in enumerate(states, start=1):
        assert_close(tuple(state), tuple(route_with_agreement(*layer, rounds=rounds, **options)))


@both
def test_agreement_is_the_resultant_length_of_the_votes_written_as_loops(layer, over):
    x, W = layer
    state = route_with_agreement(x, W, over=over)
    assert_close(state.agreement, paper.each_image(lambda x, c: paper.agreement(x, W.numpy(), c), x, state.coupling))


def test_agreement_is_1_for_parallel_votes_and_0_for_votes_that_cancel(double):
    x, direction = double(1, 2, E), double(D)
    to_direction = torch.stack([torch.outer(direction, x[0, i]) for i in range(2)])[:, None]
    assert_close(route_with_agreement(x, to_direction, rounds=1).agreement, torch.ones(1, 1, dtype=torch.float64))
    to_direction[1] *= -x[0, 0].square().sum() / x[0, 1].square().sum()
    assert_close(route_with_agreement(x, to_direction, rounds=1).agreement, torch.zeros(1, 1, dtype=torch.float64))


@both
@pytest.mark.parametrize("agreement", ["cosine", "inner"])
def test_capsules_that_are_off_are_as_good_as_absent_however_long_their_votes(layer, over, agreement):
    x, W = layer
    on = torch.tensor([True, False, True, True, False, True, True])
    W[~on] *= 1e6
    found = route(x, W, over=over, agreement=agreement, on=on.expand(B, I))
    absent = route(x[:, on], W[on], over=over, agreement=agreement)
    assert_close(found.z, absent.z)
    assert_close(found.coupling[:, on], absent.coupling)
    assert_close(found.coupling[:, ~on], torch.zeros(B, 2, J, dtype=torch.float64))


@both
def test_an_image_with_all_capsules_off_routes_nothing(layer, over):
    on = torch.ones(B, I, dtype=torch.bool)
    on[2] = False
    found = route(*layer, over=over, on=on)
    assert_close(found.z[2], torch.zeros(J, D, dtype=torch.float64))
    assert_close(found.coupling[2], torch.zeros(I, J, dtype=torch.float64))
    assert_close(found.z[:2], route(*layer, over=over).z[:2])


@both
def test_negated_capsules_have_the_same_couplings_and_negated_results(layer, over):
    x, W = layer
    positive, negative = route(x, W, over=over), route(-x, W, over=over)
    assert_close(negative.coupling, positive.coupling)
    assert_close(negative.z, -positive.z)


@both
def test_a_rotation_of_all_weights_of_an_upper_capsule_rotates_that_capsule_and_nothing_else(layer, double, over):
    x, W = layer
    rotations = torch.linalg.qr(double(J, D, D)).Q
    plain, rotated = route(x, W, over=over), route(x, rotations @ W, over=over)
    assert_close(rotated.coupling, plain.coupling)
    assert_close(rotated.z, (rotations @ plain.z.unsqueeze(3)).squeeze(3))


@both
def test_the_order_of_the_capsules_of_both_layers_carries_over(layer, rng, over):
    x, W = layer
    lower, upper = torch.randperm(I, generator=rng), torch.randperm(J, generator=rng)
    plain, permuted = route(x, W, over=over), route(x[:, lower], W[lower][:, upper], over=over)
    assert_close(permuted.coupling, plain.coupling[:, lower][:, :, upper])
    assert_close(permuted.z, plain.z[:, upper])


def test_the_forward_map_is_equation_3_written_as_loops(layer, coupling):
    x, W = layer
    expected = paper.each_image(lambda x, c: paper.forward(x, W.numpy(), c), x, coupling)
    assert_close(forward_map(x, W, coupling), expected)


def test_the_reverse_map_is_algorithm_1_written_as_loops(double, layer, coupling):
    capsules, W = double(B, J, D), layer[1]
    expected = paper.each_image(lambda h, c: paper.reverse(h, W.numpy(), c), capsules, coupling)
    assert_close(reverse_map(capsules, W, coupling), expected)


def test_the_reverse_map_is_the_transpose_of_the_forward_map(double, layer, coupling):
    (x, W), capsules = layer, double(B, J, D)
    assert_close((forward_map(x, W, coupling) * capsules).sum(), (x * reverse_map(capsules, W, coupling)).sum())


@pytest.mark.parametrize("numbers", [1, 2 * B * I * E, 10**9])
def test_the_forward_map_at_once_is_equation_3_for_any_number_of_capsules_at_once(
    layer, coupling, numbers, monkeypatch
):
    x, W = layer
    monkeypatch.setattr("capsnb.routing._NUMBERS_AT_ONCE", numbers)
    expected = paper.each_image(lambda x, c: paper.forward(x, W.numpy(), c), x, coupling)
    assert_close(forward_at_once(x, W, coupling), expected)


@both
@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_an_accelerator_routes_as_the_processor_does_in_double_precision(layer, over, dtype, within, accelerator):
    there = [tensor.to(accelerator, dtype) for tensor in layer]
    for found, expected in zip(route_with_agreement(*there, over=over), route_with_agreement(*layer, over=over)):
        assert_close(found.cpu().double(), expected, rtol=within, atol=within)


def test_an_accelerator_maps_as_the_processor_does(layer, coupling, accelerator):
    x, W = layer
    there = [tensor.to(accelerator) for tensor in (x, W, coupling)]
    assert_close(forward_map(*there).cpu(), forward_map(x, W, coupling))
    capsules = forward_map(x, W, coupling)
    assert_close(reverse_map(capsules.to(accelerator), *there[1:]).cpu(), reverse_map(capsules, W, coupling))


@pytest.mark.parametrize(
    "function, shape", [(forward_map, (2, 3, 11)), (forward_at_once, (2, 3, 11)), (reverse_map, (2, 5, 7))]
)
def test_gradients_agree_with_finite_differences(function, shape, double):
    """Also where an image does not couple to a capsule and is left out of its product."""
    inputs, W, coupling = double(*shape), double(3, 5, 7, 11), double(2, 3, 5)
    coupling[1, :, 4] = 0
    both = inputs.requires_grad_(), W.requires_grad_()
    assert torch.autograd.gradcheck(lambda inputs, W: function(inputs, W, coupling), both)


def test_an_empty_batch_gives_an_empty_result(layer):
    x, W = layer
    found = route(x[:0], W)
    assert found.coupling.shape == (0, I, J) and found.z.shape == (0, J, D)


def test_single_precision_stays_single_and_close_to_double(layer):
    x, W = layer
    found = route(x.float(), W.float())
    assert_close(found.z, route(x, W).z.float(), rtol=1e-4, atol=1e-4)


@both
def test_only_the_inner_agreement_depends_on_the_size_of_the_weights(layer, over):
    (x, W), options = layer, {"over": over, "agreement": "inner"}
    assert_close(route(x, 3 * W, over=over).coupling, route(x, W, over=over).coupling)
    assert not torch.allclose(route(x, 3 * W, **options).coupling, route(x, W, **options).coupling, atol=0.1)


def test_an_unknown_option_and_too_few_rounds_are_refused(layer):
    with pytest.raises(ValueError, match="unknown agreement 'dot'; choose one of 'cosine', 'inner'"):
        route(*layer, agreement="dot")
    for sharpness in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"sharpness is {sharpness}, expected a number above 0"):
            route(*layer, sharpness=sharpness)
    with pytest.raises(ValueError, match="unknown over 'both'; choose one of 'upper', 'lower'"):
        route(*layer, over="both")
    with pytest.raises(ValueError, match="rounds is 0, expected at least 1"):
        route(*layer, rounds=0)


@pytest.mark.parametrize("name", ["x", "W"])
def test_nan_is_refused_by_name(layer, name):
    tensors = dict(zip(("x", "W"), layer))
    tensors[name].view(-1)[5] = float("nan")
    with pytest.raises(ValueError, match=f"^{name} holds NaN or infinite values"):
        route(**tensors)


def test_wrong_shapes_and_types_are_refused_with_what_was_expected(layer, as_users_run):
    x, W = layer
    with pytest.raises(ValueError, match=r"x has shape \(3, 6, 13\), expected \(any, 7, 13\)"):
        route(x[:, :-1], W)
    with pytest.raises(ValueError, match=r"x has shape \(7, 13\), expected \(any, 7, 13\)"):
        route(x[0], W)
    with pytest.raises(ValueError, match=r"W has shape \(7, 5, 11\).*\[I, J, d, e\]"):
        route(x, W[..., 0])
    with pytest.raises(ValueError, match=r"x holds torch.int64.*x\.float\(\)"):
        route(x.long(), W)
