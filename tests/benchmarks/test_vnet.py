"""The benchmark of the memory levels at toy size, and its table."""

import pytest

from benchmarks.questions import memory_levels

SLOW = "least, alpha 8, beta 16"  # either is in another case


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case == SLOW else ()) for case in memory_levels.CASES],
)
def test_every_case_is_measured_and_predicted(case):
    row = memory_levels.row_of(case, (2, 64, 96))
    assert 0 < row["predicted_mib"] < 2 * row["peak_mib"]


def test_the_levels_are_timed_and_the_table_drawn():
    size = (2, 64, 96)
    (ratio,) = memory_levels.time_ratio("lowest", list(size), rounds=2, threads=1)
    rows = [
        memory_levels.row_of(case, size) | {"ratio": found}
        for case, found in {"plain": None, "lowest": ratio}.items()
    ]
    head, table = memory_levels.table({"rows": rows, "settings": {"size": list(size)}})
    assert [row[0] for row in table] == ["plain", "lowest"]
    assert {len(row) for row in table} == {len(head)}
    assert table[0][-1] == "1"
    assert table[1][4].startswith("1/")
    assert "Validation" in memory_levels.validation({"rows": rows})
