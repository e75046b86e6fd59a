"""The two files that an experiment leaves, a JSON of records and safetensors beside it with their arrays, and the
command line that all experiments share.
"""

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from capsnb import checkpoints, runs
from capsnb.pretrained import WEIGHTS


class Results:
    """What the files hold, and what is added.  Raises ValueError if they were made with another seed or size."""

    records = "variants"  # what the JSON calls its records

    def __init__(self, out: Path, quick: bool, seed: int):
        self.json, self.tensors = out, out.with_suffix(".safetensors")
        self.quick, self.seed = quick, seed
        facts = {"quick": quick, "seed": seed}
        self.content = checkpoints.read_json(out) if out.exists() else {**facts, self.records: {}}
        self.arrays = checkpoints.read(self.tensors)[0] if self.tensors.exists() else {}
        for name, value in facts.items():
            if self.content[name] != value:
                raise ValueError(f"{out} was made with {name} {self.content[name]}, not {value}; choose another --out")

    def holds(self, name: str, **facts) -> bool:
        """Whether the record is finished, with the facts (settings, weights ...) that it would have now."""
        record = self.content[self.records].get(name, {})
        return any(self._of(name, key) for key in self.arrays) and facts.items() <= record.items()

    def add(self, name: str, record: dict, arrays: dict[str, Tensor]) -> None:
        """Write a finished record and its arrays.

        These are called ``name``, or begin with it and a slash, and replace all earlier ones of that name.
        """
        self.arrays = {key: array for key, array in self.arrays.items() if not self._of(name, key)} | arrays
        self.content[self.records][name] = record
        self.write()

    def write(self) -> None:
        """Write both files; the arrays first, so that numbers never stand without them."""
        self.content["versions"] = runs.versions()
        checkpoints.write(self.tensors, self.arrays)
        checkpoints.write_json(self.json, self.content)

    @staticmethod
    def _of(name: str, key: str) -> bool:
        return key == name or key.startswith(f"{name}/")


def digest(tensors: Iterable[Tensor]) -> str:
    """Sixteen letters that change when any number in the ``tensors`` does."""
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


def of_files(*paths: Path) -> str:
    """Sixteen letters that change when any of the files does."""
    content = hashlib.sha256()
    for path in paths:
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def fingerprint(*names: str) -> str:
    """What changes when a weight file of ``names`` does, or one that it shares a stage with."""
    paths = []
    for name in names:
        path = WEIGHTS / f"{name}.safetensors"
        shared = checkpoints.read(path)[1].get("autoencoder")
        paths += [path, path.with_name(shared)] if shared else [path]
    return of_files(*paths)


def command_line(
    doc: str, names: list[str], arguments: list[str] | None, results: type[Results] = Results
) -> tuple[Results, list[str]]:
    """The files of results and the chosen ``names``, from the arguments that all experiments take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or to go on with")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of: {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="little of everything, on the sample: for checks only")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        return results(options.out, options.quick, options.seed), options.only or names
    except ValueError as error:
        parser.error(str(error))
