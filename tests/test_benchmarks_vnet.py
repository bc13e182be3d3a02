"""The benchmarks of the memory levels and of stacks at toy size, and their tables."""

import json
import sys

import pytest

from benchmarks import memory_levels, report_levels, report_stacks, stacks


@pytest.mark.parametrize("case", memory_levels.CASES)
def test_every_case_is_measured_and_predicted(case):
    row = memory_levels.measure(case, (2, 64, 96))
    assert 0 < row["predicted_mib"] < 2 * row["peak_mib"]


def test_the_levels_are_timed_and_the_table_drawn():
    size = (2, 64, 96)
    ratios = memory_levels.time_ratios(("lowest",), size, rounds=2)
    rows = [memory_levels.measure(case, size) | {"ratio": ratios.get(case)} for case in ("plain", "lowest")]
    head, table = report_levels.table({"rows": rows, "settings": {"size": list(size)}})
    assert [row[0] for row in table] == ["plain", "lowest"]
    assert {len(row) for row in table} == {len(head)}
    assert table[0][-1] == "1"
    assert table[1][4].startswith("1/")
    assert "Validation" in report_levels.validation({"rows": rows})


def test_stacks_and_their_table(tmp_path, monkeypatch):
    arguments = ["--depths", "2", "--threads", "1", "--rounds", "1", "--shape", "2", "8", "12", "10", "--out"]
    monkeypatch.setattr(sys, "argv", ["stacks", *arguments, str(tmp_path)])
    stacks.main()
    result = json.loads((tmp_path / "stacks.json").read_text())
    head, table = report_stacks.table(result)
    assert head == ["", "depth 2, 1 thread"]
    assert [row[0] for row in table] == ["plain", *stacks.WAYS]
    peaks = {row["way"]: row["peak_mib"] for row in result["rows"]}
    assert peaks["revseg Stack"] <= peaks["revseg"]
    assert peaks["plain Stack"] < result["rows"][0]["plain_mib"]
