"""The network that CapsNet and the sparse capsules share: its parts against Sabour 2017 written as loops."""

from dataclasses import replace

import numpy as np
import paper
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch.testing import assert_close

from capsnb.affine_mnist import in_frame
from capsnb.baselines.capsule_network import CapsuleNetwork, NetworkSettings, route_with_gradient, squared_error
from capsnb.capsules import squash

SMALL = NetworkSettings(channels=3, types=2, primary_dim=3, dim=5, first_hidden=7, second_hidden=11, shift=0)
B, I, J, D, E = 3, 7, 5, 11, 13  # noqa: E741


def small(**changes):
    torch.manual_seed(5)
    return CapsuleNetwork(replace(SMALL, **changes), J)


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_routing_is_procedure_1_written_as_loops(double, rounds):
    x, W = squash(double(B, I, E)), double(I, J, D, E)
    found = route_with_gradient(x, W, rounds)
    for part, name in enumerate(("coupling", "z")):
        expected = paper.each_image(lambda x: paper.routing(x, W.numpy(), rounds, "upper", "inner")[part], x)
        assert_close(getattr(found, name), expected)


def test_the_gradient_is_that_of_the_last_round_with_its_couplings_as_constants(double):
    x, W, upstream = squash(double(B, I, E)).requires_grad_(), double(I, J, D, E).requires_grad_(), double(B, J, D)
    found = torch.autograd.grad(squash(route_with_gradient(x, W, 3).z), (x, W), upstream)
    coupling = paper.each_image(lambda x: paper.routing(x, W.detach().numpy(), 3, "upper", "inner")[0], x.detach())
    z = torch.einsum("bij,ijde,bie->bjd", coupling, W, x)
    assert_close(found, torch.autograd.grad(squash(z), (x, W), upstream))


@pytest.mark.parametrize("size, stride", [(28, 2), (40, 4)])
def test_primary_capsules_are_two_layers_of_filters_written_as_sums(digits, size, stride):
    network, images = small(size=size, stride=stride).double(), in_frame(digits[0][:2].double(), size)
    parameters = {name: tensor.detach().numpy() for name, tensor in network.convolutions.named_parameters()}
    windows = sliding_window_view(images[:, 0].numpy(), (9, 9), axis=(1, 2))
    first = np.einsum("byxuv,cuv->bcyx", windows, parameters["0.weight"][:, 0]) + parameters["0.bias"][:, None, None]
    windows = sliding_window_view(np.maximum(first, 0), (9, 9), axis=(2, 3))[:, :, ::stride, ::stride]
    second = np.einsum("bcyxuv,kcuv->bkyx", windows, parameters["2.weight"]) + parameters["2.bias"][:, None, None]
    found = network.lower_capsules(images).double()
    for image in range(2):
        for place in range(36):
            for kind in range(2):
                z = second[image, 3 * kind : 3 * kind + 3, place // 6, place % 6]
                assert_close(found[image, 2 * place + kind], torch.as_tensor(paper.squash(z)), rtol=1e-5, atol=1e-8)


def test_images_in_parts_have_the_capsules_of_images_together(digits, monkeypatch):
    network = small().eval()
    together = network.encode(digits[0][:17])
    monkeypatch.setattr("capsnb.baselines.capsule_network.PART", 5)
    assert_close(network.encode(digits[0][:17]), together)


def test_the_squared_error_is_a_sum_over_pixels(double):
    found, images = double(3, 1, 5, 7), double(3, 1, 5, 7)
    pairs = zip(found.flatten(1).tolist(), images.flatten(1).tolist())
    expected = torch.tensor([sum((a - b) ** 2 for a, b in zip(*pair)) for pair in pairs], dtype=torch.float64)
    assert_close(squared_error(found, images), expected)


def test_upper_capsules_are_those_of_the_last_round_squashed(digits):
    network, images = small(), digits[0][:3]
    x, W = network.lower_capsules(images).detach(), network.W.detach()
    z = paper.each_image(lambda x: paper.routing(x, W.numpy(), 3, "upper", "inner")[1], x)
    assert_close(network.encode(images), squash(z.float()))
