"""A decoder as a list of layers, for the browser: what ``capsnb/web/layers.js`` reads."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from capsnb.model import ConvAutoencoder


def described(layers: Sequence[nn.Module]) -> list[dict]:
    """What each layer does, in the order in which they follow.

    Raises ValueError for a layer that the browser cannot run.
    """
    facts = [_described(layer, f"dense.{number}") for number, layer in enumerate(layers)]
    return [each for each in facts if each]


def _described(layer: nn.Module, name: str) -> dict | None:
    """Nothing for a layer that only gives numbers another shape."""
    match layer:
        case nn.Linear(in_features=inputs, out_features=outputs) if outputs % 4 == 0:  # its products go in fours
            return {"kind": "dense", "name": name, "inputs": inputs, "outputs": outputs}
        case nn.ReLU():
            return {"kind": "relu", "slope": 0}
        case nn.LeakyReLU(negative_slope=slope):
            return {"kind": "relu", "slope": slope}
        case nn.Sigmoid():
            return {"kind": "sigmoid"}
        case ConvAutoencoder():
            return {"kind": "filters", "slope": layer.settings.slope}
        case nn.Flatten() | nn.Unflatten():
            return None
    raise ValueError(f"the browser has no layer like {layer}; see capsnb/web/layers.js for those it has")


def layer_tensors(layers: Sequence[nn.Module]) -> dict[str, Tensor]:
    """What the layers multiply and add, each in the order in which the browser multiplies."""
    tensors = {}
    for number, layer in enumerate(layers):
        if isinstance(layer, nn.Linear):
            tensors |= {f"bias.{number}": layer.bias, f"dense.{number}": layer.weight.T}
        elif isinstance(layer, ConvAutoencoder):
            tensors |= filter_tensors(layer)
    return tensors


def filter_tensors(stage1: ConvAutoencoder) -> dict[str, Tensor]:
    """The way back through stage 1."""
    return {
        "filters1": stage1.filters1.permute(2, 3, 1, 0),  # [9 · 9, C]
        "filters2": stage1.filters2.permute(1, 2, 3, 0),  # [C · 9 · 9, C]
        "biases2": stage1_bias(stage1, 2),
        "output_bias": stage1.output_bias,
    }


def stage1_bias(stage1: ConvAutoencoder, layer: int) -> Tensor:
    """The bias of a layer of stage 1: zero in the bias-free reading."""
    bias = stage1.biases[layer]
    return torch.zeros(stage1.settings.channels) if bias is None else bias
