"""Weight files for the browser: what ``capsnb/web/engine.js`` reads.

    <name>.json           what the widgets show (``manifest``), and where every tensor lies in the other files
    <name>.decoder.bin    stage 3 and the way back through stage 1: enough to decode
    <name>.encoder.bin    stage 2 and the biases of stage 1: the rest, fetched when a reader draws

The other systems have a decoder of layers (``capsnb.web_layers``) and no encoder.
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
from capsnb.movable import CHOICES, EXPERTS, Model, model_name
from capsnb.packing import pack
from capsnb.web_layers import described, filter_tensors, layer_tensors, stage1_bias

DATASETS = CHOICES[EXPERTS].datasets
_IMAGES_A_CLASS = 2


def write(model: Model, dataset: str, out: Path, *, system: str = EXPERTS, exact: bool = False) -> None:
    """Write the files of ``model``, trained on ``dataset``, to ``out``, the large tensors in few bits unless ``exact``.

    Raises ValueError for a model that the browser cannot run.
    """
    facts, name, files = manifest(model, dataset, system), model_name(system, dataset), {}
    tensors, moments = parts(model, facts), feature_moments(model, dataset)
    out.mkdir(parents=True, exist_ok=True)
    for part in tensors:
        content, layout = pack(tensors[part], moments, exact=exact)
        digest = hashlib.sha256(content).hexdigest()[:16]
        files[part] = {"file": f"{name}.{part}.bin", "bytes": len(content), "digest": digest, "tensors": layout}
        (out / files[part]["file"]).write_bytes(content)
    text = json.dumps(facts | {"files": files}, separators=(",", ":"))
    (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def parts(model: Model, facts: dict) -> dict[str, dict[str, Tensor]]:
    """The tensors of every file.  Raises ValueError for a model that the browser cannot run."""
    if not isinstance(model, ExpertCapsules):
        return {"decoder": layer_tensors(model.layers)}
    _check(model)
    return {"decoder": decoder_tensors(model, facts), "encoder": encoder_tensors(model)}


def manifest(model: Model, dataset: str, system: str = EXPERTS) -> dict:
    """What the widgets need to know of ``model``, trained on ``dataset``: sizes, settings, poses, 20 real test images.

    ``kinds`` holds, for every capsule, the commonest label of the shipped test images that it wins, or -1. ``systems``
    are those that there are files of.
    """
    images, labels = data.load(dataset, "test", sample=True)
    capsules = model.encode(images)
    winners = winner(capsules)
    won = [labels[winners == j] for j in range(capsules.shape[1])]
    chosen = sorted(k for label in labels.unique() for k in (labels == label).nonzero()[:_IMAGES_A_CLASS, 0].tolist())
    poses, known = model.poses, {"mean": _rounded(model.poses.mean), "spread": _rounded(model.poses.spread)}
    return _sizes(model) | {
        "name": model_name(system, dataset),
        "system": system,
        "dataset": dataset,
        "systems": _systems(),
        "classes": CLASSES[dataset],
        "kinds": [mine.mode().values.item() if len(mine) else -1 for mine in won],
        "poses": known | {"bounded": poses.bounded, "reach": poses.reach},
        "digits": [_digit(number, images[number], labels[number], capsules[number]) for number in chosen],
    }


def _systems() -> dict[str, dict]:
    rows = {name: row._asdict() for name, row in CHOICES.items()}
    return {name: {key: value for key, value in row.items() if key != "load"} for name, row in rows.items()}


def _sizes(model: Model) -> dict:
    if not isinstance(model, ExpertCapsules):
        capsules, dim = model.poses.mean.shape
        return {"capsules": capsules, "dim": dim, "layers": described(model.layers)}
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
    origin = {"origin": stage1.origin}  # [C, 6 · 6]
    return filter_tensors(stage1) | origin | _by_capsule("U", U, [0, *shown, *range(len(U))])


def encoder_tensors(model: ExpertCapsules) -> dict[str, Tensor]:
    """What encoding needs beyond ``decoder_tensors``; the filters are the same."""
    biases = {f"biases{layer}": stage1_bias(model.autoencoder, layer) for layer in (0, 1)}
    return biases | _by_capsule("W", model.encoder.W.permute(1, 2, 0, 3), range(model.encoder.W.shape[1]))


def _by_capsule(name: str, tensor: Float[Tensor, "J d I e"], order: Iterable[int]) -> dict[str, Tensor]:
    """One matrix a capsule, in ``order``; the numbers of one scale multiply the same number of a pose."""
    return {f"{name}.{j}": tensor[j] for j in order}


def feature_moments(model: Model, dataset: str) -> dict[str, Float[Tensor, "C C"]]:
    """The second moment of the features of one position, which the second filters multiply, over training images."""
    if not isinstance(model, ExpertCapsules):
        return {}
    with torch.no_grad():
        features = model.autoencoder.encode(data.load(dataset, "train", sample=True)[0][:200])
    flat = features.permute(0, 2, 3, 1).flatten(0, 2).double()
    return {"filters2": flat.T @ flat / len(flat)}


def _check(model: ExpertCapsules) -> None:
    sparsity = model.settings.encoder.sparsity
    if sparsity is None or sparsity.on_after_training != 1:
        raise ValueError("the browser encodes with one capsule on; export a model of the preset 'sparse'")
