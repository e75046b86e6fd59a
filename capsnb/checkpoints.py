"""Files of trained weights: safetensors with their settings inside, written so that no crash leaves half a file."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write(path: Path, tensors: dict[str, Tensor], **facts) -> None:
    """Write ``tensors`` and the JSON-able ``facts`` to ``path``, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, partial, {"capsnb": json.dumps(facts)})
    os.replace(partial, path)


def read_facts(path: Path) -> dict:
    """The facts of ``path`` alone, even while another process puts a new file in its place.  Raises as ``read``."""
    return _opened(path, "np", lambda file: json.loads(file.metadata()["capsnb"]))


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and facts of ``path``.  Raises FileNotFoundError, or ValueError for a corrupt or foreign file."""
    def content(file) -> tuple[dict[str, Tensor], dict]:
        facts = json.loads(file.metadata()["capsnb"])
        return {name: file.get_tensor(name) for name in file.keys()}, facts

    return _opened(path, "pt", content)


def _opened(path: Path, framework: str, content: Callable):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; train it with `python -m capsnb train`, or check the name")
    try:
        with safe_open(path, framework) as file:
            return content(file)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a complete capsnb weight file ({error}); delete it and remake it") from error


def write_json(path: Path, content) -> None:
    """Write ``content`` as readable JSON, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def read_json(path: Path):
    """The content of a JSON file.  Raises FileNotFoundError, or ValueError for a corrupt file."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not complete JSON ({error}); make it again") from error


def pack_optimiser(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as tensors named ``optimiser/parameter/entry``."""
    state = optimiser.state_dict()["state"]
    entries = ((index, key, value) for index, entry in state.items() for key, value in entry.items())
    return {f"optimiser/{index}/{key}": torch.as_tensor(value) for index, key, value in entries}


def unpack_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put what ``pack_optimiser`` gave back into ``optimiser``."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, *rest = name.split("/")
        if prefix == "optimiser":
            state.setdefault(int(rest[0]), {})[rest[1]] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
