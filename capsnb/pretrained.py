"""Trained models: the ones that ship with capsnb, and those in a folder of your own."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from capsnb import checkpoints, packing, settings
from capsnb.checks import require_choice
from capsnb.model import ExpertCapsules

WEIGHTS = Path(__file__).parent / "weights"
NAMES = ("mnist", "fashion-mnist", "mnist-paper", "mnist-dense", "mnist-bias-free")


Network = TypeVar("Network", bound=nn.Module)


def load_pretrained(name: str) -> ExpertCapsules:
    """A trained model that ships with capsnb, in evaluation mode on the CPU.

    "mnist" and "fashion-mnist" are the default preset, "mnist-paper" and "mnist-dense" the other two, and
    "mnist-bias-free" the default with the other reading of stage 1.
    Raises ValueError for another name.
    """
    require_choice(name, NAMES, "pretrained model")
    return load_model(WEIGHTS / f"{name}.safetensors")


def load_model(path: Path | str) -> ExpertCapsules:
    """The model that ``save_model`` wrote to ``path``.  Raises FileNotFoundError, or ValueError for another file."""
    return load_network(lambda content: ExpertCapsules(settings.from_dict(content)), path)


def load_network(make: Callable[[dict], Network], path: Path | str) -> Network:
    """The network of which ``path`` holds the weights, in evaluation mode on the CPU; ``make`` takes its settings.

    Raises FileNotFoundError, or ValueError for the file of another network.
    """
    path = Path(path)
    tensors, facts = checkpoints.read(path)
    if facts.get("autoencoder"):
        shared, _ = checkpoints.read(path.with_name(facts["autoencoder"]))
        tensors |= {key: value for key, value in shared.items() if key.startswith("autoencoder.")}
    try:
        network = make(facts["settings"])
        wanted = network.state_dict()
        network.load_state_dict({key: value.to(wanted[key]) for key, value in packing.restored(tensors).items()})
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a whole model ({reason}); make one with `python -m capsnb train`") from error
    return network.eval()


def save_model(
    model: ExpertCapsules, path: Path, *, dtype: torch.dtype = torch.float32, autoencoder: str | None = None, **facts
) -> None:
    """Write ``model`` with its settings and ``facts`` (data set, seed ...) inside.

    ``autoencoder`` names a weight file in the same folder that already holds the same stage 1, which is then left out.
    Raises ValueError if that stage 1 is another.
    """
    tensors = {key: value.to(dtype) for key, value in model.state_dict().items()}
    if autoencoder:
        shared, _ = checkpoints.read(path.with_name(autoencoder))
        mine = [key for key in tensors if key.startswith("autoencoder.")]
        if not all(key in shared and torch.equal(shared[key].to(dtype), tensors.pop(key)) for key in mine):
            raise ValueError(f"{path.with_name(autoencoder)} holds another stage 1; leave out --share-autoencoder")
    checkpoints.write(path, tensors, settings=asdict(model.settings), autoencoder=autoencoder, **facts)
