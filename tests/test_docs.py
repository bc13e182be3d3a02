"""The Python of docs/ works when pasted from the top of a page to its end; its links lead somewhere."""

import re
import runpy
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks import record
from docs import generate
from tests.test_readme import assert_commands, assert_leads_somewhere

ELSEWHERE = ("training", "data")  # their blocks run in tests/training and tests/data
PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
ROOT = sorted(Path(__file__).parents[1].glob("*.md"))
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINKS = [
    (page, link)
    for page in [*PAGES, *ROOT]
    for link in re.findall(r"\]\(([^)h#][^)]*)\)", CODE.sub("", page.read_text()))
]


def blocks(page, language):
    """The code of a page, but for those pages whose code other tests run."""
    return (
        []
        if page.stem in ELSEWHERE
        else re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    )


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem
)
def test_the_python_of_a_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.py").write_text("\n".join(blocks(page, "python")))
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(tmp_path / "page.py"))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")], ids=lambda page: page.stem)
def test_the_commands_of_a_page(page):
    for block in blocks(page, "sh"):
        assert_commands(block)


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda each: getattr(each, "stem", each))
def test_a_link(page, link):
    assert_leads_somewhere(page, link)


def test_the_site_lists_every_page():
    nav = (ROOT[0].parent / "mkdocs.yml").read_text()
    assert sorted(re.findall(r": ([\w-]+\.md)$", nav, re.MULTILINE)) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", generate.PAGES)
def test_a_page_of_the_reference_is_what_the_code_says(page):
    """`python -m docs.generate` writes it anew."""
    assert (PAGES[0].parent / page).read_text() == generate.PAGES[page]()


def test_how_near_predictions_come_is_what_the_results_say():
    text = (PAGES[0].parent / "memory-prediction.md").read_text()
    said = [float(value) / 100 for value in re.findall(r"\| (\d+\.\d) % \|", text)]
    results = record.Results(record.RESULTS)
    levels = {"float32": [0.0], "bfloat16": [0.0]}
    for row in results.get("memory_levels")["rows"]:
        if "off" in row:
            levels["bfloat16" if "bfloat16" in row["case"] else "float32"].append(abs(row["off"]))
    networks = [
        max(abs(case["off"]) for case in row["cases"].values() if "off" in case)
        for row in results.get("training_memory")["rows"]
        if any("off" in case for case in row["cases"].values())
    ]
    assert f"| {len(networks)} networks" in text
    rows = [row for row in results.get("prediction")["rows"] if "measured_mib" in row]
    small = max(abs(row["predicted_mib"] / row["measured_mib"] - 1) for row in rows)
    assert f"| {len({row['network'] for row in rows})} networks at 192" in text
    levels_of_all = [max(levels["float32"]), max(levels["bfloat16"]), small]
    found = [*levels_of_all, statistics.median(networks), max(networks)]
    assert said == pytest.approx(found, abs=1e-3)
