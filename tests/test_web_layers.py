"""Decoders as lists of layers: what the browser multiplies, written here with matrices, is what torch makes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from capsnb.web_layers import described, layer_tensors


def run(layers, codes):
    """The images of codes [B, J · d], by the facts and the tensors alone."""
    tensors, values = layer_tensors(layers), codes
    for fact in described(layers):
        values = STEPS[fact["kind"]](fact, tensors, values)
    return values.view(-1, 1, 28, 28)


def dense(fact, tensors, values):
    assert values.shape[1] == fact["inputs"]
    found = tensors[fact["name"].replace("dense", "bias")] + values @ tensors[fact["name"]]
    assert found.shape[1] == fact["outputs"]
    return found


def filters(fact, tensors, values):
    """The products with the filters, every patch added to the map where it belongs."""
    channels = tensors["filters2"].shape[-1]
    patches = tensors["filters2"].reshape(-1, channels) @ values.view(-1, channels, 36)
    maps = F.fold(patches, (20, 20), 9, stride=2).flatten(2) + tensors["biases2"][:, None]
    patches = tensors["filters1"].reshape(81, channels) @ F.leaky_relu(maps, fact["slope"])
    return (F.fold(patches, (28, 28), 9) + tensors["output_bias"]).sigmoid()


STEPS = {
    "dense": dense,
    "relu": lambda fact, _, values: F.leaky_relu(values, fact["slope"]),
    "sigmoid": lambda fact, _, values: values.sigmoid(),
    "filters": filters,
}


def test_the_layers_one_after_the_other_are_the_decoder(small_networks, small_vae, rng):
    for _, moved in [*small_networks.values(), small_vae]:
        codes = torch.randn(7, *moved.poses.mean.shape, generator=rng)
        assert_close(run(moved.layers, codes.flatten(1)), moved.decode(codes))


@pytest.mark.parametrize("layer", [nn.Tanh(), nn.Linear(3, 7)], ids=["another kind", "outputs not in fours"])
def test_a_layer_that_the_browser_does_not_have_is_refused(layer):
    with pytest.raises(ValueError, match="the browser has no layer like"):
        described([nn.Linear(5, 4), layer])
