"""Compare the numbers in the text with what commands and cells wrote: python tools/check_numbers.py [--write]

In the markdown cells of the notebooks and in README.md a comment, which no reader sees, follows a number directly:

    0.75<!--=weights/mnist.evaluation.json:measures.purity-->   a value of a file in capsnb/, by its path
    75%<!--=weights/mnist.evaluation.json:measures.purity-->    the same value, times 100
    5.0<!--=results/speed.json:training.stages.1.seconds / 60-->   computed: + - * / between spaces, from the left
    14.5<!--=above-->   a code cell of the same notebook prints this number
    0.2<!--=given-->    chosen, taken from a source, or worked out in the text

In a path, keys are joined by dots; the entries of a list are 0, 1 ... or, from its end, -1, -2 ... Every decimal,
percentage, time and size of memory needs such a comment, unless it stands in code, mathematics or an address, or is a
reference such as "section 2.1". ``--write`` puts what the files say in the place of what disagrees, with as many
decimals. Cells are counted from 0, code cells too.
"""

import json
import operator
import re
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
DIGITS = r"(?<![\w.,])[-−]?\d+(?:,\d{3})*(?:\.\d+)?"
ANNOTATED = re.compile(rf"(?P<shown>{DIGITS})(?P<unit>[%°]?)<!--=(?P<source>.*?)-->")
UNITS = "%|per cent|ms|milliseconds?|seconds?|minutes?|hours?|[kMG]B|(?:kilo|mega|giga)bytes?"
MEASURED = re.compile(rf"(?<![\w.])\d[\d,]*(?:\.\d+%?|\s*(?:{UNITS})(?!\w))")
NOT_PROSE = re.compile(
    r"""(?P<ticks>`+).+?(?P=ticks)       # code, in a line or in a block, and roles such as {eq}`eq-2.1`
    |   \$\$.*?\$\$(?:\ *\([\w.-]+\))?   # displayed equations with their labels
    |   \$[^$]+\$                        # inline mathematics
    |   <!--(?!=).*?-->                  # comments of another kind
    |   \]\([^)]*\) | https?://\S+       # addresses
    |   \b(?:arxiv|chapters?|eq\.|equations?|exercises?|fig\.|python|sections?)\s+\d[\d.]*   # references and versions
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)


class Text(NamedTuple):
    """One markdown text: where it stands, what it says, and the numbers that cells of its notebook print."""

    place: str
    text: str
    printed: set[tuple[Decimal, bool]]


def decimal(shown: str) -> Decimal:
    """The number that is written, which may have thousands commas and a typographer's minus."""
    return Decimal(shown.replace(",", "").replace("−", "-"))


def outputs(notebook: dict) -> Iterator[str]:
    """All that the code cells printed, and their tables."""
    for output in (output for cell in notebook["cells"] for output in cell.get("outputs", [])):
        yield "".join(output.get("text", ""))
        data = output.get("data", {})
        yield "".join(data.get("text/plain", ""))
        html = "".join(data.get("text/html", ""))
        yield re.sub("<[^>]*>", " ", html) if "<table" in html else ""


def printed_numbers(text: str) -> set[tuple[Decimal, bool]]:
    """Every number in a text, with whether it is a percentage."""
    return {(decimal(found[1]), found[2] == "%") for found in re.finditer(rf"({DIGITS})(%?)(?!\w)", text)}


def texts(path: Path, root: Path) -> list[Text]:
    """The markdown cells of a notebook, or the whole of any other file."""
    place = path.relative_to(root).as_posix()
    if path.suffix != ".ipynb":
        return [Text(place, path.read_text("utf-8"), set())]
    notebook = json.loads(path.read_text("utf-8"))
    printed = printed_numbers("\n".join(outputs(notebook)))
    numbered = [(number, cell) for number, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "markdown"]
    return [Text(f"{place}, cell {number}", "".join(cell["source"]), printed) for number, cell in numbered]


def prose(text: str) -> str:
    """The text with spaces in the place of all that is not prose; every character stays where it was."""
    return NOT_PROSE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def file_value(name: str, path: str, root: Path) -> Decimal:
    """The value at ``path`` in a JSON file of the package.  Raises ValueError where there is none."""
    if not (root / "capsnb" / name).is_file():
        raise ValueError(f"there is no file capsnb/{name}")
    value = json.loads((root / "capsnb" / name).read_text("utf-8"), parse_float=Decimal)
    try:
        for key in path.split("."):
            value = value[int(key) if isinstance(value, list) else key]
    except (IndexError, KeyError, TypeError, ValueError):
        raise ValueError(f"capsnb/{name} has no {path}") from None
    if isinstance(value, bool) or not isinstance(value, (int, Decimal)):
        raise ValueError(f"{path} in capsnb/{name} is not a number")
    return Decimal(value)


def value_of(source: str, root: Path) -> Decimal:
    """What ``source`` comes to, computed from the left.  Raises ValueError where it cannot be computed."""
    terms, signs = source.split(" ")[::2], source.split(" ")[1::2]
    if len(terms) != len(signs) + 1 or not set(signs) <= set(OPERATORS):
        raise ValueError(f"{source!r} is not above, given, or values with single spaces and + - * / between them")
    values = [
        Decimal(text) if re.fullmatch(r"\d+(\.\d+)?", text) else file_value(*text.partition(":")[::2], root)
        for text in terms
    ]
    value = values[0]
    for sign, operand in zip(signs, values[1:], strict=True):
        value = OPERATORS[sign](value, operand)
    return value


def rewritten(shown: str, value: Decimal) -> str:
    """The value with the decimals, the commas and the kind of minus of the number that is shown."""
    decimals = len(shown.partition(".")[2])
    commas = "," if "," in shown or abs(decimal(shown)) < 1000 else ""
    text = f"{value:{commas}.{decimals}f}"
    return text.replace("-", "−") if "−" in shown else text


def agree(shown: str, value: Decimal) -> bool:
    """Whether the value rounds to the number that is shown; a half may go either way."""
    last_digit = Decimal(1).scaleb(-len(shown.partition(".")[2]))
    return abs(decimal(shown) - value) <= last_digit / 2


def annotated(text: str) -> list[re.Match]:
    """Every number in the prose with its comment."""
    return [found for found in ANNOTATED.finditer(prose(text))]


def problem(found: re.Match, printed: set[tuple[Decimal, bool]], root: Path) -> str | None:
    """What is wrong with an annotated number, None if it is right."""
    shown, unit, source = found["shown"], found["unit"], found["source"]
    if source == "given":
        return None
    if source == "above":
        return None if (decimal(shown), unit == "%") in printed else f"no cell prints {shown}{unit}"
    try:
        value = value_of(source, root) * (100 if unit == "%" else 1)
    except ValueError as error:
        return f"{shown}{unit}: {error}"
    return None if agree(shown, value) else f"{shown}{unit} should be {rewritten(shown, value)}{unit}: {source}"


def problems(piece: Text, root: Path) -> list[str]:
    """All numbers of a text that are wrong, and those whose source is not stated."""
    found = [problem(match, piece.printed, root) for match in annotated(piece.text)]
    rest = ANNOTATED.sub("", prose(piece.text))
    found += [f"no number directly before {comment}" for comment in re.findall("<!--=.*?-->", rest)]
    rest = re.sub("<!--=.*?-->", "", rest)
    found += [f"{match[0]} has no source behind it, such as <!--=given-->" for match in MEASURED.finditer(rest)]
    return [f"{piece.place}: {text}" for text in found if text]


def repaired(text: str, root: Path) -> str:
    """The text with the numbers that the files contain in the place of those that disagree with them."""
    for found in reversed(annotated(text)):
        try:
            value = value_of(found["source"], root) * (100 if found["unit"] == "%" else 1)
        except ValueError:  # nothing computed: problems() says so
            continue
        if not agree(found["shown"], value):
            text = text[: found.start("shown")] + rewritten(found["shown"], value) + text[found.end("shown") :]
    return text


def repair(path: Path, root: Path) -> None:
    """Rewrite the numbers of a notebook or a text in place; nothing else changes."""
    if path.suffix != ".ipynb":
        path.write_text(repaired(path.read_text("utf-8"), root), "utf-8", newline="\n")
        return
    notebook = json.loads(path.read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    new = [repaired("".join(cell["source"]), root) for cell in cells]
    if new != ["".join(cell["source"]) for cell in cells]:
        for cell, text in zip(cells, new, strict=True):
            cell["source"] = text.splitlines(keepends=True)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8", newline="\n")


def places(root: Path) -> list[Path]:
    """The files whose numbers are checked: the notebooks and README.md."""
    return [*sorted(root.glob("book/**/*.ipynb")), root / "README.md"]


def main(root: Path, *, write: bool) -> None:
    """Print every problem, after repairing what the files can repair; leave with 1 if one remains."""
    for path in places(root) if write else []:
        repair(path, root)
    left = [line for path in places(root) for piece in texts(path, root) for line in problems(piece, root)]
    print("\n".join(left) or "every number agrees with its source")
    sys.exit(bool(left))


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--write"]):
        sys.exit(__doc__)
    main(Path(__file__).parents[1], write=sys.argv[1:] == ["--write"])
