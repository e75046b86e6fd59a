"""Weight files for the browser: what ``capsnb/web/engine.js`` reads.

    <name>.json           what the widgets show (``manifest``), and where every tensor lies in the other two files
    <name>.decoder.bin    stage 3 and the way back through stage 1: enough to decode
    <name>.encoder.bin    stage 2 and the biases of stage 1: the rest, fetched when a reader draws
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from capsnb import data
from capsnb.evaluation import winner
from capsnb.explorer import CLASSES
from capsnb.model import ExpertCapsules
from capsnb.packing import pack

DATASETS = ("mnist", "fashion-mnist")
_IMAGES_A_CLASS = 2


def write(model: ExpertCapsules, dataset: str, out: Path, *, exact: bool = False) -> None:
    """Write the files of ``model``, trained on ``dataset``, to ``out``, the large tensors in few bits unless ``exact``.

    Raises ValueError for a model that the browser cannot run.
    """
    _check(model)
    out.mkdir(parents=True, exist_ok=True)
    facts, moment, files = manifest(model, dataset), feature_moment(model, dataset), {}
    for part, tensors in (("decoder", decoder_tensors(model, facts)), ("encoder", encoder_tensors(model))):
        content, layout = pack(tensors, {"filters2": moment}, exact=exact)
        digest = hashlib.sha256(content).hexdigest()[:16]
        files[part] = {"file": f"{dataset}.{part}.bin", "bytes": len(content), "digest": digest, "tensors": layout}
        (out / files[part]["file"]).write_bytes(content)
    text = json.dumps(facts | {"files": files}, separators=(",", ":"))
    (out / f"{dataset}.json").write_text(text + "\n", encoding="utf-8")


def manifest(model: ExpertCapsules, dataset: str) -> dict:
    """What the widgets need to know of ``model``, trained on ``dataset``: sizes, settings, poses, 20 real test images.

    ``kinds`` holds, for every capsule, the commonest label of the shipped test images that it wins, or -1.
    """
    images, labels = data.load(dataset, "test", sample=True)
    capsules = model.encode(images)
    winners = winner(capsules)
    won = [labels[winners == j] for j in range(capsules.shape[1])]
    chosen = sorted(k for label in labels.unique() for k in (labels == label).nonzero()[:_IMAGES_A_CLASS, 0].tolist())
    spread = model.poses.covariance.diagonal(dim1=1, dim2=2).sqrt()
    return _sizes(model) | {
        "name": dataset,
        "classes": CLASSES[dataset],
        "kinds": [mine.mode().values.item() if len(mine) else -1 for mine in won],
        "poses": {"mean": _rounded(model.poses.mean), "spread": _rounded(spread)},
        "digits": [_digit(number, images[number], labels[number], capsules[number]) for number in chosen],
    }


def _sizes(model: ExpertCapsules) -> dict:
    capsules, lower, lower_dim, dim = model.decoder.U.shape
    return {
        "capsules": capsules,
        "dim": dim,
        "lower": lower,
        "lowerDim": lower_dim,
        "rounds": model.decoder.rounds,
        "slope": model.settings.autoencoder.slope,
        "inputScale": model.settings.encoder.input_scale,
    }


def _digit(number: int, image: Tensor, label: Tensor, capsules: Tensor) -> dict:
    pixels = (image.flatten() * 255).round().int().tolist()
    return {"number": number, "label": label.item(), "image": pixels, "code": _rounded(capsules.flatten())}


def _rounded(values: Tensor) -> list:
    return json.loads(json.dumps(values.tolist()), parse_float=lambda text: round(float(text), 6))


def decoder_tensors(model: ExpertCapsules, facts: dict) -> dict[str, Tensor]:
    """What decoding needs, each in the order in which the browser multiplies.

    The filters come first, then capsule 0, with which the explorer begins, then those of the test images in ``facts``,
    the manifest, with which the other pages do: a picture can be drawn while the rest of the file is on its way.
    """
    stage1, U = model.autoencoder, model.decoder.U.permute(0, 3, 1, 2)
    shown = [winner(torch.tensor(digit["code"]).view(1, len(U), -1)).item() for digit in facts["digits"]]
    return {
        "filters1": stage1.filters1.permute(2, 3, 1, 0),  # [9 · 9, C]
        "filters2": stage1.filters2.permute(1, 2, 3, 0),  # [C · 9 · 9, C]
        "biases2": _bias(model, 2),
        "output_bias": stage1.output_bias,
        "origin": stage1.origin,  # [C, 6 · 6]
    } | _by_capsule("U", U, [0, *shown, *range(len(U))])


def encoder_tensors(model: ExpertCapsules) -> dict[str, Tensor]:
    """What encoding needs beyond ``decoder_tensors``; the filters are the same."""
    biases = {"biases0": _bias(model, 0), "biases1": _bias(model, 1)}
    return biases | _by_capsule("W", model.encoder.W.permute(1, 2, 0, 3), range(model.encoder.W.shape[1]))


def _by_capsule(name: str, tensor: Float[Tensor, "J d I e"], order: Iterable[int]) -> dict[str, Tensor]:
    """One matrix a capsule, in ``order``; the numbers of one scale multiply the same number of a pose."""
    return {f"{name}.{j}": tensor[j] for j in order}


def _bias(model: ExpertCapsules, layer: int) -> Tensor:
    bias = model.autoencoder.biases[layer]
    return torch.zeros(model.autoencoder.settings.channels) if bias is None else bias


def feature_moment(model: ExpertCapsules, dataset: str) -> Float[Tensor, "C C"]:
    """The second moment of the features of one position, which the second filters multiply, over training images."""
    with torch.no_grad():
        features = model.autoencoder.encode(data.load(dataset, "train", sample=True)[0][:200])
    flat = features.permute(0, 2, 3, 1).flatten(0, 2).double()
    return flat.T @ flat / len(flat)


def _check(model: ExpertCapsules) -> None:
    sparsity = model.settings.encoder.sparsity
    if sparsity is None or sparsity.on_after_training != 1:
        raise ValueError("the browser encodes with one capsule on; export a model of the preset 'sparse'")
