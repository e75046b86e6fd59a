"""Every number in the text has a source and agrees with it; the checker sees what is wrong and repairs what it can."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
from check_numbers import agree, main, places, printed_numbers, problems, prose, repair, rewritten, texts

ROOT = Path(__file__).parents[1]
MEASURES = {"purity": 0.7538, "share": [0.0386, 0.5, 0.125]}
RESULTS = {"n": 60000, "measures": MEASURES, "stages": {"1": {"seconds": 298.7}}}
FILE = "results/tiny.json"
PURITY = f"<!--={FILE}:measures.purity-->"


@pytest.fixture
def write(tmp_path):
    """Make a book of one notebook, with a results file; returns what writes its text."""
    (tmp_path / "capsnb/results").mkdir(parents=True)
    (tmp_path / "capsnb" / FILE).write_text(json.dumps(RESULTS))
    (tmp_path / "README.md").write_text("No numbers.\n")
    (tmp_path / "book").mkdir()

    def write(*lines, printed=""):
        outputs = [{"output_type": "stream", "name": "stdout", "text": [printed]}]
        cells = [
            {"cell_type": "code", "id": "a", "metadata": {}, "outputs": outputs, "source": ["0.99"]},
            {"cell_type": "markdown", "id": "b", "metadata": {}, "source": "\n".join(lines).splitlines(keepends=True)},
        ]
        notebook = {"cells": cells, "metadata": {"title": "Größe"}, "nbformat": 4, "nbformat_minor": 5}
        path = tmp_path / "book/01-tiny.ipynb"
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")
        return path

    write.root = tmp_path
    return write


def wrong(write, *lines, printed=""):
    """The problems of a notebook with these lines, each without the name of its place."""
    found = [line for text in texts(write(*lines, printed=printed), write.root) for line in problems(text, write.root)]
    assert all(line.startswith("book/01-tiny.ipynb, cell 1: ") for line in found)
    return [line.partition(": ")[2] for line in found]


@pytest.mark.parametrize("path", places(ROOT), ids=lambda path: path.stem)
def test_every_number_in_the_text_has_a_source_and_agrees_with_it(path):
    found = [line for text in texts(path, ROOT) for line in problems(text, ROOT)]
    assert found == [], "python tools/check_numbers.py --write repairs what comes from files"


@pytest.mark.parametrize(
    "line",
    [
        f"0.75{PURITY}, 0.7538{PURITY}, 75%{PURITY} and 75.4%{PURITY}",
        f"60,000<!--={FILE}:n--> or 60000<!--={FILE}:n-->",
        f"the first 3.9%<!--={FILE}:measures.share.0--> and the last 0.125<!--={FILE}:measures.share.-1-->",
        f"5.0<!--={FILE}:stages.1.seconds / 60--> minutes",
        f"-0.25<!--={FILE}:measures.purity - 1--> or −0.25<!--={FILE}:measures.purity - 1-->",
        f"a ratio of 6.0<!--={FILE}:measures.purity / {FILE}:measures.share.2-->",
        "a rate of 0.1<!--=given-->",
    ],
)
def test_a_number_that_its_file_contains_is_right(write, line):
    assert wrong(write, line) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"0.76{PURITY}", f"0.76 should be 0.75: {FILE}:measures.purity"),
        (f"74%{PURITY}", f"74% should be 75%: {FILE}:measures.purity"),
        (f"75{PURITY}", f"75 should be 1: {FILE}:measures.purity"),
        (f"-0.75{PURITY}", f"-0.75 should be 0.75: {FILE}:measures.purity"),
        (f"0.1<!--={FILE}:measures.probe-->", f"0.1: capsnb/{FILE} has no measures.probe"),
        (f"0.1<!--={FILE}:measures.share.3-->", f"0.1: capsnb/{FILE} has no measures.share.3"),
        (f"0.1<!--={FILE}:measures.share-->", f"0.1: measures.share in capsnb/{FILE} is not a number"),
        ("0.1<!--=results/none.json:a-->", "0.1: there is no file capsnb/results/none.json"),
        (f"5.0<!--={FILE}:stages.1.seconds/60-->", f"5.0: capsnb/{FILE} has no stages.1.seconds/60"),
        (f"5.0<!--={FILE}:stages.1.seconds / -->", "5.0: there is no file capsnb/"),
        (f"**0.75**{PURITY}", f"no number directly before {PURITY}"),
    ],
)
def test_a_wrong_number_and_a_wrong_source_are_named(write, line, said):
    assert said in wrong(write, line)


def test_a_number_is_wrong_as_soon_as_its_file_changes(write):
    assert wrong(write, f"0.75{PURITY}") == []
    (write.root / "capsnb" / FILE).write_text(json.dumps({"measures": {"purity": 0.81}}))
    assert wrong(write, f"0.75{PURITY}") == [f"0.75 should be 0.81: {FILE}:measures.purity"]


@pytest.mark.parametrize(("shown", "value", "right"), [
    ("0.12", "0.125", True), ("0.13", "0.125", True), ("0.12", "0.1251", False), ("0.13", "0.1249", False),
    ("-0.12", "-0.125", True), ("1,000", "1000.4", True), ("0.50", "0.5", True), ("0.50", "0.51", False),
])  # fmt: skip
def test_a_number_is_right_if_the_value_rounds_to_it_and_a_half_may_go_either_way(shown, value, right):
    assert agree(shown, Decimal(value)) is right


def test_what_a_cell_of_the_same_notebook_prints_may_be_quoted_and_nothing_else(write):
    printed = "score 0.420 after 1,406 steps\nshare 99.4% loss -0.31 [1e-07"
    line = "0.42<!--=above--> 1,406<!--=above--> 99.4%<!--=above--> -0.31<!--=above-->"
    assert wrong(write, line, printed=printed) == []
    for shown in ("0.99", "99.4", "0.31", "0.4", "406", "42%"):  # 0.99 stands in the source of the cell only
        assert wrong(write, f"{shown}<!--=above-->", printed=printed) == [f"no cell prints {shown}"]


def test_numbers_are_read_from_tables_of_text_and_of_html(tmp_path):
    assert printed_numbers("| a12 | 0.5 | 20x16 | 7% |") == {(Decimal("0.5"), False), (Decimal(7), True)}
    data = {"text/plain": ["3.5"], "text/html": ['<table width="9.5"><td>4.5</td></table>'], "image/png": "5.5"}
    cells = [{"cell_type": "code", "outputs": [{"data": data}, {"data": {"text/html": "<p>6.5</p>"}}], "source": ""},
             {"cell_type": "markdown", "source": ""}]  # fmt: skip
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    (text,) = texts(tmp_path / "a.ipynb", tmp_path)
    assert text.printed == {(Decimal("3.5"), False), (Decimal("4.5"), False)}


@pytest.mark.parametrize("number", ["0.5", "-0.5", "12%", "12 %", "3.5%", "5 minutes", "1,266 MB", "7 per cent"])
def test_a_measured_number_without_a_source_is_named(write, number):
    (said,) = wrong(write, f"It is {number}, as we saw.")
    assert said == f"{number.lstrip('-')} has no source behind it, such as <!--=given-->"


@pytest.mark.parametrize("line", [
    "`0.5` and ``0.5 `0.6` `` and {eq}`eq-2.1`", "```python\nx = 0.5\n```", "  ```\n  0.5\n  ```",
    "$0.5$ and $a\n= 0.5$",
    "$$\n0.5\n$$ (eq-2.1)", "[a](b-0.5.html), https://c.org/0.5", "<!-- 0.5 -->",
    "Exercise 2.1, section 4.1, Python 3.11",
    "16 numbers, 20 capsules, 2019", "arXiv 1907.11643", "the minutes of 3",
])  # fmt: skip
def test_code_mathematics_addresses_references_and_counts_need_no_source(write, line):
    assert wrong(write, line) == []
    assert len(prose(line)) == len(line)  # so that what is found stands where it was found
    assert wrong(write, line, "then 0.5") == ["0.5 has no source behind it, such as <!--=given-->"]


def test_repair_writes_what_the_file_says_and_changes_nothing_else(write):
    said = f"“{{}}{PURITY}”, {{}}%{PURITY} of {{}}<!--={FILE}:n-->; {{}}<!--={FILE}:measures.purity - 1-->;"
    kept = "0.3<!--=above--> 0.4<!--=given--> 0.6<!--=results/none.json:a--> 0.7$0.1$ `0.1" + PURITY + "`"
    repair(write(said.format("0.1", "74.0", "50,000", "−0.33"), kept), write.root)
    repaired = (write.root / "book/01-tiny.ipynb").read_bytes()
    assert repaired == write(said.format("0.8", "75.4", "60,000", "−0.25"), kept).read_bytes()


def test_repair_leaves_a_file_alone_whose_numbers_are_right(write):
    path = write(f"0.75{PURITY}")
    path.write_text(json.dumps(json.loads(path.read_text("utf-8"))), "utf-8")  # another layout: rewriting would show
    before = path.read_bytes()
    repair(path, write.root)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("shown", "value", "new"), [
    ("0.5", "0.25", "0.2"), ("0.500", "0.25", "0.250"), ("7", "12.6", "13"), ("1500", "2500", "2500"),
    ("1,500", "2500", "2,500"), ("900", "1250", "1,250"), ("−0.5", "-0.25", "−0.2"), ("-5", "-6", "-6"),
])  # fmt: skip
def test_a_repaired_number_keeps_the_decimals_the_commas_and_the_minus_of_the_old_one(shown, value, new):
    assert rewritten(shown, Decimal(value)) == new


def test_the_command_names_what_is_wrong_repairs_it_when_asked_and_fails_while_something_is_left(write, capsys):
    write(f"0.1{PURITY}")
    (write.root / "README.md").write_text(f"0.2{PURITY}\n")
    with pytest.raises(SystemExit) as left:
        main(write.root, write=False)
    assert left.value.code == 1
    assert capsys.readouterr().out == (
        f"book/01-tiny.ipynb, cell 1: 0.1 should be 0.8: {FILE}:measures.purity\n"
        f"README.md: 0.2 should be 0.8: {FILE}:measures.purity\n"
    )
    with pytest.raises(SystemExit) as left:
        main(write.root, write=True)
    assert left.value.code == 0 and (write.root / "README.md").read_text() == f"0.8{PURITY}\n"
