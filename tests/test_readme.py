"""The examples of README.md work when pasted, each by itself."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from benchmarks import record, report
from benchmarks.paper import page
from revseg import cli
from revseg.commands import COMMANDS, named

README = Path(__file__).parents[1] / "README.md"
MAKEFILE = README.with_name("Makefile")
TEXT = README.read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def run(tmp_path):
    """Runs the example that holds a word."""

    def run(word):
        (tmp_path / "example.py").write_text(next(code for code in EXAMPLES if word in code))
        runpy.run_path(str(tmp_path / "example.py"))

    return run


@pytest.mark.parametrize("code", EXAMPLES[1:], ids=range(2, len(EXAMPLES) + 1))
def test_example(run, code):
    run(code)


def test_the_first_example_prints_what_stands_below_it(run, capsys):
    run("revseg.fit")
    assert capsys.readouterr().out == re.search(r"^```text\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)[1]


def test_the_first_screen():
    first = TEXT[: TEXT.index("## Which tool")].splitlines()
    assert len(first) <= 60
    assert "```python" in first


def test_the_memory_example_shows_the_saving(run, capsys):
    run("peak_bytes")
    ours, plain = ([int(n) for n in line.split()] for line in capsys.readouterr().out.splitlines())
    assert ours[0] * 8 < plain[0]
    assert ours[1] < plain[1]


def test_the_table_is_that_of_the_results(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(README.read_text())
    assert report.rewrite(copy, report.fragment(record.RESULTS))
    assert copy.read_text() == README.read_text(), "run python -m benchmarks report"
    assert (record.RESULTS.parent / "README.md").read_text() == report.readme(record.RESULTS)
    assert (record.ROOT / "docs" / "paper-tables.md").read_text() == page(record.Results(record.RESULTS))


def assert_leads_somewhere(page, link):
    """A link of a page names a file, and a heading of it that is there."""
    path, _, heading = link.partition("#")
    target = page.parent / path
    assert target.exists()
    if heading:
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        assert heading in [re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings]


def assert_commands(block):
    """Each line names a command that is there, with flags that it takes and values that it lets through."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and "=" in words[0]:  # REVSEG_KERNELS=0 revseg doctor
            words = words[1:]
        if words[:1] == ["torchrun"]:
            words = words[words.index("-m") + 1 :]
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", MAKEFILE.read_text(), re.MULTILINE)
        elif words[:1] == ["revseg"]:
            name = next(name for name in (" ".join(words[1:3]), words[1]) if name in COMMANDS)
            kind = named(COMMANDS[name].settings)
            given = words[1 + len(name.split()) :]
            cli._parsed(name, kind, cli.spelled_out(given, kind))
        else:
            assert not words or words[:2] == ["pip", "install"], line


@pytest.mark.parametrize("block", re.findall(r"^```sh\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
def test_commands(block):
    assert_commands(block)
