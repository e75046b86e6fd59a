"""Move the book to another repository: python tools/set_url.py https://github.com/OWNER/REPOSITORY

The address stands in ``_config.yml``; this rewrites it there and in every other file that needs it.
"""

import re
import sys
from pathlib import Path

GITHUB = "https://github.com/"
TEXTS = ["_config.yml", "pyproject.toml", "README.md", "CONTRIBUTING.md", "CITATION.cff"]


def places(root: Path) -> list[Path]:
    """The files that name the repository: five texts and every notebook."""
    return [root / name for name in TEXTS] + sorted(root.glob("book/**/*.ipynb"))


def current_url(root: Path) -> str:
    """The repository's address as ``_config.yml`` gives it."""
    return re.search(rf"^  url: ({GITHUB}\S+)$", (root / "_config.yml").read_text("utf-8"), re.MULTILINE)[1]


def set_url(root: Path, url: str) -> None:
    """Replace the old address by ``url`` everywhere, in links to GitHub and to Colab.

    Raises ValueError unless ``url`` has the form https://github.com/OWNER/REPOSITORY (Colab opens no others).
    """
    url = url.removesuffix("/").removesuffix(".git")
    if not re.fullmatch(rf"{GITHUB}[\w.-]+/[\w.-]+", url):
        raise ValueError(f"{url!r} is not of the form {GITHUB}OWNER/REPOSITORY")
    # The lookahead keeps an address that merely begins like ours.
    old, new = (address.removeprefix(GITHUB) for address in (current_url(root), url))
    ours = re.compile(rf"(github\.com/|colab\.research\.google\.com/github/){re.escape(old)}(?![\w-])")
    for path in places(root):
        path.write_text(ours.sub(rf"\g<1>{new}", path.read_text("utf-8")), "utf-8", newline="\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    set_url(Path(__file__).parents[1], sys.argv[1])
