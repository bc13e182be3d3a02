"""The examples of README.md work when pasted, each by itself."""

import re
import runpy
from pathlib import Path

import pytest

from benchmarks import record, report

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def run(tmp_path):
    """Runs the example that holds a word."""

    def run(word):
        (tmp_path / "example.py").write_text(next(code for code in EXAMPLES if word in code))
        runpy.run_path(str(tmp_path / "example.py"))

    return run


@pytest.mark.parametrize("code", EXAMPLES, ids=range(1, len(EXAMPLES) + 1))
def test_example(run, code):
    run(code)


def test_the_first_example_is_there():
    assert "from revseg import ReversibleSequence, AdditiveCoupling, OneSidedCoupling\n" in EXAMPLES[0]
    assert len([line for line in EXAMPLES[0].splitlines() if line]) <= 10


def test_the_memory_example_shows_the_saving(run, capsys):
    run("peak_bytes")
    ours, plain = ([int(n) for n in line.split()] for line in capsys.readouterr().out.splitlines())
    assert ours[0] * 8 < plain[0]
    assert ours[1] < plain[1]


def test_the_parameters_of_the_paper(run, capsys):
    run("p.numel()")
    assert capsys.readouterr().out == "162272\n"


def test_the_table_is_that_of_the_results(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(README.read_text())
    assert report.rewrite(copy, report.fragment(record.RESULTS))
    assert copy.read_text() == README.read_text(), "run python -m benchmarks report"
    assert (record.RESULTS.parent / "README.md").read_text() == report.readme(record.RESULTS)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)h#][^)]*)\)", README.read_text()))
def test_links_lead_somewhere(link):
    path, _, heading = link.partition("#")
    target = README.parent / path
    assert target.exists()
    if heading:
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        assert heading in [re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings]
