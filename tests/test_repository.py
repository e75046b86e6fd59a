"""The repository agrees with itself: addresses, table of contents, notebooks as they are committed."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from set_url import TEXTS, current_url, places, set_url

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("book/**/*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def printed(cell):
    """Everything that a code cell left as text: streams, tracebacks, plain text and HTML."""
    for output in cell["outputs"]:
        yield from output.get("text", [])
        yield from output.get("traceback", [])
        for mime, content in output.get("data", {}).items():
            if mime.startswith("text/"):
                yield from content


def test_the_configuration_is_read_with_the_same_address_by_the_book_and_by_set_url():
    assert current_url(ROOT) == yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["repository"]["url"]


@pytest.mark.parametrize("name", TEXTS)
def test_every_text_names_the_repository_of_the_configuration_and_no_other(name):
    found = re.findall(r"https://github\.com/[\w.-]+/[\w.-]*[\w-]", (ROOT / name).read_text("utf-8"))
    assert set(found) == {current_url(ROOT)}


@each_notebook
def test_a_notebook_opens_itself_in_colab_and_installs_this_repository_there(path):
    owner_and_name = current_url(ROOT).removeprefix("https://github.com/")
    itself = f"https://colab.research.google.com/github/{owner_and_name}/blob/main/{path.relative_to(ROOT).as_posix()}"
    links = re.findall(r"https://colab\.research\.google\.com/github/[^)\s]+", source(cells(path, "markdown")[0]))
    assert links == [itself]
    installed = re.findall(r"git\+(\S+)", source(cells(path, "code")[0]))
    assert installed == [current_url(ROOT)]


def test_one_command_moves_every_address_to_another_repository(tmp_path):
    for path in places(ROOT):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    old = current_url(ROOT).removeprefix("https://github.com/")
    set_url(tmp_path, "https://github.com/some-one/a.book.git")
    for path in places(tmp_path):
        text = path.read_text("utf-8")
        assert f"github.com/{old}" not in text and f"/github/{old}" not in text
        assert "some-one/a.book" in text
    assert current_url(tmp_path) == "https://github.com/some-one/a.book"


@pytest.mark.parametrize("url", ["https://example.org/owner/book", "https://github.com/owner", "owner/book"])
def test_an_address_that_colab_cannot_open_is_refused(url):
    with pytest.raises(ValueError, match="OWNER/REPOSITORY"):
        set_url(ROOT, url)


@each_notebook
def test_a_notebook_is_a_chapter_of_the_table_of_contents(path):
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    chapters = [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]
    assert path.relative_to(ROOT).with_suffix("").as_posix() in chapters


@each_notebook
def test_a_notebook_begins_with_its_number_and_title(path):
    first_line = source(cells(path, "markdown")[0]).splitlines()[0]
    assert re.match(rf"# {int(path.stem[:2])}\. \S", first_line), first_line


@each_notebook
def test_no_code_cell_is_longer_than_20_lines(path):
    assert [source(cell) for cell in cells(path, "code") if len(source(cell).splitlines()) > 20] == []


@each_notebook
def test_every_code_cell_is_committed_as_it_was_run_from_top_to_bottom(path):
    counts = [cell["execution_count"] for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))


@each_notebook
def test_no_committed_output_is_an_error_or_names_a_folder_of_the_machine_that_made_it(path):
    assert not any(output["output_type"] == "error" for cell in cells(path, "code") for output in cell["outputs"])
    text = "".join(line for cell in cells(path, "code") for line in printed(cell))
    assert re.findall(r"(?<![\w/+])/(?:home|opt|root|tmp|work)/\S*", text) == []


@each_notebook
def test_every_picture_that_a_cell_leaves_has_an_alternative_text(path):
    for cell in cells(path, "code"):
        if any(mime.startswith("image/") for output in cell["outputs"] for mime in output.get("data", {})):
            assert cell["metadata"].get("mystnb", {}).get("image", {}).get("alt"), source(cell)


def test_the_example_of_the_readme_runs(monkeypatch):
    monkeypatch.setenv("CAPSNB_QUICK", "1")  # the shipped sample, whatever data sets are here
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["capsules"].shape == (8, 20, 16) and names["pictures"].shape == (8, 1, 28, 28)
