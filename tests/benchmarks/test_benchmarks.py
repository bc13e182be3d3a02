"""Every benchmark runs at toy size, and all ways of the workload compute the same."""

import pytest
import torch

from benchmarks import record, report, timing
from benchmarks.functions import FUNCTIONS
from benchmarks.questions import memory_depth, step_time
from benchmarks.rivals import is_available
from benchmarks.ways import WAYS
from benchmarks.workload import workload
from revseg.memory import peak_bytes

TOY = (2, 8, 12, 10)


@pytest.fixture(autouse=True)
def one_thread():
    """Toy tensors on two threads mostly wait, for seconds when the other core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def outcome(way, function, depth=2):
    """Output and gradients, in float64 so that reconstruction costs nothing."""
    work = workload(way, depth, function, TOY)
    parameters = list(work.functions.double().parameters())  # gradients are converted too
    x = work.x.detach().double().requires_grad_()
    y = work.net(x)
    expected = y.detach().clone()
    y.backward(work.dy.double())
    return [expected, x.grad, *(p.grad for p in parameters)]


@pytest.mark.parametrize(
    ("way", "function"),
    [
        (way, function)
        for way in WAYS
        for function in FUNCTIONS
        if way != "plain"
        and (not way.startswith("compile") or function == "conv pair")  # the compiler is slow
    ],
)
@pytest.mark.filterwarnings("ignore")  # memcnn uses names that torch has deprecated
def test_all_ways_compute_the_same(way, function):
    if not is_available(way):
        pytest.skip(f"{way} is not installed")
    for ours, plain in zip(outcome(way, function), outcome("plain", function), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-7, atol=1e-9)


def test_reversible_step_does_not_grow_with_depth():
    shape = (2, 8, 64, 64)
    steps = {depth: workload("revseg", depth, shape=shape) for depth in (2, 8)}
    peaks = {depth: peak_bytes(work.step, before=work.step) for depth, work in steps.items()}
    map_bytes = 2 * 4 * 64 * 64 * 4
    assert peaks[8] - peaks[2] < map_bytes / 2  # plain stores 12 maps a block


def test_memory_depth_and_its_table(tmp_path):
    rows = memory_depth.rows_of([2, 4], ["plain", "revseg", "checkpoint"], TOY)
    assert [row["depth"] for row in rows] == [2, 2, 2, 4, 4, 4]
    saved = {(row["way"], row["depth"]): row["saved_mib"] for row in rows}
    assert saved["plain", 4] > saved["plain", 2]
    record.write("memory_depth", "?", rows, {"shape": list(TOY)}, tmp_path)
    table = report.readme(tmp_path)
    assert "| revseg | " in table
    assert "depth 4" in table
    assert torch.__version__ in table


def test_a_step_too_large_is_said_not_run():
    (row,) = memory_depth.rows_of([4], ["plain"], TOY, limit_gib=1e-6)
    assert row["peak_mib"] is None
    assert "not run" in row["note"]


def test_step_time_and_its_tables(tmp_path):
    rows = step_time.ratios(1, ["revseg", "revseg keep=half"], rounds=3, shape=TOY)
    rows += step_time.ratios(1, ["revseg", step_time.ONE_MORE], rounds=2, function="mlp", shape=TOY)
    for row in rows:
        assert row["ratio"]["min"] <= row["ratio"]["low"] <= row["ratio"]["median"]
        assert row["ratio"]["median"] <= row["ratio"]["high"] <= row["ratio"]["max"]
    rows = [row | {"heap": "keeps pages", "threads": 1, "shape": list(TOY)} for row in rows]
    half = dict.fromkeys(("median", "low", "high"), 0.5)
    rows.append(rows[0] | {"shape": [1, 8, 2, 2], "plain_s": 0.25, "ratio": half})
    settings = {"heaps": timing.HEAPS, "shape": list(TOY)}
    record.write("step_time", "?", rows, settings, tmp_path)
    table = report.readme(tmp_path)
    assert (
        "| depth 1, 1 thread, heap keeps pages | depth 1, 1 thread, heap keeps pages, 1 x 8 x 2 x 2 |"
        in table
    )
    assert "1 (0.25 s) |\n| revseg |" in table
    assert "0.50 (0.50 to 0.50) |\n| revseg keep=half |" in table
    assert "0.50" not in report.overview(tmp_path)  # the first screen is about the main size
    assert "| mlp | revseg |" in table
    assert "depth 1: revseg " in report.overview(tmp_path)


def test_spread_of_a_known_row():
    expected = {"median": 3, "low": 2, "high": 4, "min": 1, "max": 5}
    assert timing.spread([5, 1, 4, 2, 3]) == expected
    assert timing.spread([2]) == dict.fromkeys(expected, 2)


def test_record_says_where_it_comes_from(tmp_path):
    result = record.read(record.write("x", "?", [], {}, tmp_path))
    assert result["versions"]["torch"] == torch.__version__
    assert result["machine"]["cpu"]
    assert {"command", "commit", "date", "settings", "rows"} <= set(result)


def test_commit_that_moves_during_a_run_is_said(tmp_path, monkeypatch):
    # A run of minutes was once stamped with a commit that came after the code it had measured.
    monkeypatch.setattr(record, "AT_START", "aaa")
    monkeypatch.setattr(record, "commit", lambda: "bbb")
    assert record.read(record.write("x", "?", [], {}, tmp_path))["commit"] == "aaa to bbb"
    monkeypatch.setattr(record, "commit", lambda: "aaa")
    assert record.read(record.write("x", "?", [], {}, tmp_path))["commit"] == "aaa"


def test_every_way_peaks_alike_in_its_first_and_second_step():
    # Why memory_depth needs no warm-up on a CPU.
    for way in (way for way in WAYS if way not in memory_depth.WARMED):
        if is_available(way):
            cold, warm = workload(way, 2, shape=TOY), workload(way, 2, shape=TOY)
            assert peak_bytes(cold.step) == peak_bytes(warm.step, before=warm.step), way


def test_rewrite_touches_only_what_is_between_the_marks(tmp_path):
    path = tmp_path / "README.md"
    assert not report.rewrite(path, "new")
    path.write_text("no marks")
    assert not report.rewrite(path, "new")
    assert path.read_text() == "no marks"
    path.write_text(f"a\n{report.OPEN}\nold\n{report.CLOSE}\nb")
    assert report.rewrite(path, "new")
    assert report.rewrite(path, "new")
    assert path.read_text() == f"a\n{report.OPEN}\nnew\n{report.CLOSE}\nb"
    path.write_text(f"{report.CLOSE}{report.OPEN}")
    with pytest.raises(ValueError, match="expected"):
        report.rewrite(path, "new")
