"""The GPU benchmark at toy size, its kernels in the interpreter: it has to run blind, and survive what fails."""

import os
import time
from functools import partial

import pytest
import torch

from benchmarks import record
from benchmarks.gpu import isolation, parts
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.goals import goals
from benchmarks.gpu.setup import Setup
from benchmarks.gpu.timing import race

TOY = Setup("cpu", toy=True, warm=False, deadline=float("inf"))


@pytest.fixture
def run(tmp_path, capsys):
    """The rows of some parts, by the command line."""

    def run(*names, minutes=2.0):
        main(["--toy", "--minutes", str(minutes), "--out", str(tmp_path), "--parts", *names])
        result = record.read(tmp_path / "gpu.jsonl")
        assert {"commit", "versions", "machine", "command"} <= set(result)
        return result["rows"], capsys.readouterr().out

    return run


def test_the_command_writes_rows_and_goals(run):
    names = ["copy", "checks float16", "block bfloat16"]
    rows, out = run(*names)
    assert [row for row in rows if "error" in row] == []
    assert {row["part"] for row in rows if "part" in row} == set(names)
    checks = [row for row in rows if row["case"] == "check"]
    assert all(row["right"] for row in checks)
    assert {row["kernel"] for row in checks if not row["live"]} == {"relaid"}  # which PyTorch does by itself
    assert {row["kernel"] for row in checks} == set(parts.KERNELS)
    steps = {row["way"]: row for row in rows if row["case"] == "block step"}
    assert {"revseg", "eager", "compile", "eager reversible"} <= set(steps)
    assert all(row["ms"]["median"] > 0 and row["of_floor"] > 0 for row in steps.values())
    measured = {
        row["what"]: row["value"] for row in rows if row["case"] == "goal" and row["dtype"] == "bfloat16"
    }
    assert measured["block step: times faster than eager reversible"] > 0
    assert "missed        bfloat16  block step: times faster than eager reversible" in out


@pytest.mark.parametrize("name", [name for name in parts.TIMED if name.startswith(("losses", "operations"))])
def test_each_operation_runs(name):
    rows = list(parts.PARTS[name](TOY))
    assert rows
    assert [row for row in rows if "error" in row] == []


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("VNet tf32", {"VNet step", "VNet frame"}),
        ("memory bfloat16", {"VNet memory"}),
        ("depth", {"peak", "time"}),
    ],
)
def test_the_network_runs(name, cases, monkeypatch):
    monkeypatch.delenv(
        "TRITON_INTERPRET"
    )  # the kernels are those of the parts above, and too slow for a network
    rows = list(parts.PARTS[name](TOY))
    assert [row for row in rows if "error" in row] == []
    assert {row["case"] for row in rows} == cases


@pytest.mark.skipif(not hasattr(os, "fork"), reason="parts are forked")
def test_a_part_that_crashes_or_hangs_does_not_stop_the_others(tmp_path, monkeypatch):
    def crashes(setup):
        yield {"case": "before"}
        os._exit(11)

    def hangs(setup):
        yield {"case": "before"}
        time.sleep(60)

    def fails(setup):
        yield {"case": "before"}
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(isolation, "CONTEXT", isolation.get_context("fork"))  # so that it knows these parts
    found = {}
    for part, deadline in ((crashes, 60), (hangs, 0), (fails, 60)):
        setup = Setup("cpu", toy=True, warm=False, deadline=time.time() + deadline)
        running = isolation.Running(part.__name__, part, setup, tmp_path)
        found[part.__name__] = running.rows(grace=1.0)
    for name, message in (
        ("crashes", "ended with exit code 11"),
        ("hangs", "killed after"),
        ("fails", "RuntimeError: CUDA error: an illegal memory access was encountered"),
    ):
        before, error = found[name]
        assert before == {"part": name, "case": "before"}
        assert error["error"].startswith(message)


def test_a_way_that_fails_leaves_the_others(monkeypatch):
    def fails():
        raise RuntimeError("out of memory")

    found = race({"good": partial(torch.ones, 2), "bad": fails}, TOY)
    assert found["bad"] == {"error": "RuntimeError: out of memory"}
    assert found["good"]["ms"]["median"] > 0


def test_without_time_nothing_is_started():
    late = Setup("cpu", toy=True, warm=False, deadline=time.time())
    assert race({"any": partial(torch.ones, 2)}, late) == {"any": {"error": "no time left"}}


def test_warming_times_nothing():
    warm = Setup("cpu", toy=True, warm=True, deadline=float("inf"))
    calls = []
    assert race({"any": lambda: calls.append(1)}, warm) == {}
    assert calls == [1]


def test_goals_take_the_best_rival_and_miss_what_was_not_measured():
    def row(way, ms, **more):
        return {"case": "block step", "way": way, "dtype": "tf32", "ms": {"median": ms}} | more

    rows = [
        row("revseg", 1.0, of_floor=0.7),
        row("eager", 3.0),
        row("eager channels_last", 1.6),
        row("compile", 1.2),
    ]
    found = {goal["what"]: goal for goal in goals(rows) if goal["dtype"] == "tf32"}
    eager = found["block step: times faster than plain eager, activations stored"]
    assert (eager["value"], eager["met"]) == (1.6, False)
    compiled = found["block step: times faster than torch.compile, activations stored"]
    assert (compiled["value"], compiled["met"]) == (1.2, True)
    assert found["block step: share of the bandwidth of a copy"]["met"]
    assert found["block step: times faster than eager reversible"]["met"] is None


def test_a_machine_without_a_gpu_is_told(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        main([])
    assert "no GPU here: --toy runs everything at toy size on the CPU" in capsys.readouterr().err
