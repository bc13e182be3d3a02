"""The benchmarks of the exact modes run at toy size, and say what the modes promise."""

from itertools import pairwise

import pytest
import torch

from benchmarks import picture, record, report
from benchmarks.questions import drift, exact_formats
from benchmarks.questions.exact_formats import FORMATS
from benchmarks.rivals import is_available
from benchmarks.workload import workload
from revseg.memory import peak_bytes

TOY = (2, 8, 12, 10)


@pytest.mark.filterwarnings("ignore")  # memcnn uses names that torch has deprecated
def test_drift_its_table_and_its_picture(tmp_path):
    ways = [way for way in drift.ALL if is_available(way)]
    rows = drift.errors(1, ways, 1, TOY) + drift.errors(6, ways, 2, TOY)
    by = {(row["way"], row["dtype"], row["depth"]): row for row in rows}
    for dtype in drift.DTYPES:
        for way in ("plain", "revseg exact", "revseg lossless"):
            row = by[way, dtype, 6]
            assert row["equal"] == row["tensors"] == 2 * (2 + 6 * 2 * (10 + 6))
        plain, exact = (by[way, dtype, 6]["error"] for way in ("plain", "revseg exact"))
        assert by["revseg lossless", dtype, 6]["error"] == plain
        assert exact < 4 * plain
    assert by["revseg", "float32", 6]["equal"] < by["revseg", "float32", 6]["tensors"]
    assert by["plain", "float32", 6]["error"] < 1e-5
    path = record.write("drift", "?", rows, {"shape": list(TOY), "seeds": 2}, tmp_path)
    table = report.readme(tmp_path)
    assert "| bfloat16 autocast | depth 1 | depth 6 | bitwise |" in table
    assert "| revseg exact | " in table
    drift.draw(record.read(path), tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes()[1:4] == b"PNG"


def test_labels_keep_their_order_and_a_gap():
    heights = {"a": 0.5, "b": 0.5, "c": 0.99, "d": 0.98, "e": 0.1}
    places = picture._spread(heights)
    order = sorted(places, key=places.__getitem__)
    assert order == ["e", "a", "b", "d", "c"]
    assert all(places[b] - places[a] >= picture.GAP - 1e-9 for a, b in pairwise(order))
    assert max(places.values()) <= 1


def test_formats_and_their_table(tmp_path):
    rows = [exact_formats.row_of(name, TOY, 2, 1) for name in FORMATS]
    exact_to = {row["format"]: row["exact_to"] for row in rows}
    assert exact_to == {
        "float32": None,
        "float32 on a grid": 12,
        "int32 fixed point": 12,
        "float32 and residues": exact_formats.LARGEST,
    }
    errors = [row["gradient_error"] for row in rows]
    assert errors[1] > errors[2] > errors[0] == errors[3]
    record.write("exact_formats", "?", rows, {"depth": 16}, tmp_path)
    table = report.readme(tmp_path)
    assert "| float32 on a grid | 2^12 | 2^-12 | " in table
    assert "| float32 and residues | any size | - | " in table


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_adds(name):
    form = FORMATS[name]()
    x, h = torch.randn(3, 4), torch.randn(3, 4)
    y = form.update(form.start(x), h)
    torch.testing.assert_close(form.read(y), x + h, rtol=0, atol=form.step or 1e-7)
    if name != "float32":
        assert torch.equal(form.undo(y, h), form.start(x))


def test_cost_is_that_of_the_default_engine_times(tmp_path):
    ratio = {"low": 1.0, "high": 1.0, "min": 1.0, "max": 1.0}
    times = [
        {"way": way, "depth": 4, "threads": 1, "heap": "default", "function": "conv pair", "plain_s": 1.0,
         "ratio": ratio | {"median": median}}
        for way, median in (("revseg", 1.2), ("revseg exact", 1.26))
    ]  # fmt: skip
    memory = [
        {"way": way, "depth": 16, "peak_mib": peak, "saved_mib": 1.0, "note": ""}
        for way, peak in (("revseg", 100.0), ("revseg exact", 104.0), ("revseg lossless", 120.0))
    ]
    record.write("memory_depth", "?", memory, {"shape": list(TOY)}, tmp_path)
    assert "| revseg lossless | 1.20 |" in report.readme(tmp_path)
    record.write("step_time", "?", times, {"heaps": {"default": {}}}, tmp_path)
    table = report.readme(tmp_path)
    assert "|  | peak, depth 16 | time, depth 4, 1 thread, heap default |" in table
    assert "| revseg exact | 1.04 | 1.05 |" in table
    assert "| revseg lossless | 1.20 | not run |" in table


def test_the_peak_of_the_exact_way_is_the_default_one():
    peaks = {}
    for way in ("revseg", "revseg exact", "revseg lossless"):
        work = workload(way, 4, shape=(2, 8, 64, 64))
        peaks[way] = peak_bytes(work.step, before=work.step)
    assert peaks["revseg exact"] <= 1.05 * peaks["revseg"]
    assert peaks["revseg lossless"] > peaks["revseg exact"]
