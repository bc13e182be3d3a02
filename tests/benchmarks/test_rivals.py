"""The rivals, the correctness matrix and the tables of memory, at toy size."""

import pytest
import torch

from benchmarks import measure, process, record, report
from benchmarks.questions import correctness, memory_depth, scale, training_memory
from benchmarks.questions.correctness import cell, cells, verdict
from benchmarks.scenarios import SCENARIOS

TOY = (2, 8, 12, 10)
OURS = ("revseg", "revseg exact", "revseg lossless", "revseg Stack")


# Of our own ways, these may say that they cannot.
REFUSED = (
    "hidden state",
    "output changed in place",
    "mask changed inside",
    "buffer that learns",
    "dataclass returned",
)
REFUSED += ("loss on something inside", "method with batch norm", ("revseg exact", "coupling that learns"))


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("way", ["plain", *OURS])
def test_ours_are_right_or_say_so(way, scenario):
    found = cell(way, scenario)
    assert found["verdict"] in ("right", "error"), found["detail"]
    if found["verdict"] == "error":
        assert way != "plain", found["detail"]
        assert scenario in REFUSED or (way, scenario) in REFUSED, found["detail"]


def test_verdicts():
    x = torch.linspace(0, 1, 5)
    assert verdict({"x": x}, {"x": x.clone()}, 1e-6)["verdict"] == "right"
    assert verdict({"x": x}, {"x": x + 1e-3}, 1e-6) == {
        "verdict": "wrong",
        "detail": "x: off by 1.0e-03 of its scale",
    }
    assert verdict({"x": None}, {"x": x}, 1e-6)["detail"] == "x: is missing"
    assert verdict({}, {"x": x}, 1e-6)["detail"] == "x: is missing"
    assert verdict({"x": x}, {"x": None}, 1e-6)["detail"] == "x: is there, and should not be"
    assert verdict({"x": x[:2]}, {"x": x}, 1e-6)["verdict"] == "wrong"
    assert verdict({"x": torch.full((2,), torch.nan)}, {"x": torch.zeros(2)}, 1e-6)["verdict"] == "wrong"
    assert verdict({"n": 2}, {"n": 1}, 1e-6)["verdict"] == "wrong"
    assert verdict(ValueError("no"), {"x": x}, 1e-6) == {"verdict": "error", "detail": "ValueError: no"}
    assert verdict(ValueError("no"), KeyError("no"), 1e-6)["verdict"] == "right"
    assert verdict({"x": x}, KeyError("no"), 1e-6)["verdict"] == "wrong"


def test_a_process_that_dies_is_a_crash_and_the_others_go_on(monkeypatch):
    def run(job, way, scenarios, limit):
        alive = scenarios[: scenarios.index("second")] if "second" in scenarios else scenarios
        rows = [{"way": way, "scenario": name, "verdict": "right", "detail": ""} for name in alive]
        return rows, "the process ended with -11"

    monkeypatch.setattr(process, "run", run)
    found = cells("revseg", ["first", "second", "third", "fourth"])
    assert found[1]["detail"] == "the process ended with -11"
    assert [row["verdict"] for row in found] == ["right", "crash", "right", "right"]
    assert [row["scenario"] for row in found] == ["first", "second", "third", "fourth"]


def test_a_process_that_takes_too_long_says_so(monkeypatch):
    monkeypatch.setattr(correctness, "LIMIT_S", 0.01)
    (found,) = cells("revseg", ["a step"])
    assert (found["verdict"], found["detail"]) == ("crash", "the process took more than 0.01 s")


def test_a_cell_comes_out_of_another_process():
    (found,) = cells("revseg", ["a step"])
    assert (found["scenario"], found["verdict"]) == ("a step", "right")


def test_the_matrix_and_its_summary(tmp_path):
    rows = [
        {"way": "revseg", "scenario": "a step", "verdict": "right", "detail": ""},
        {
            "way": "other",
            "scenario": "a step",
            "verdict": "wrong",
            "detail": "dx: off by 1 | of its scale. And more",
        },
    ]
    record.write("correctness", "?", rows, {"scenarios": {"a step": "A training step."}}, tmp_path)
    text, short = report.readme(tmp_path), report.overview(tmp_path)
    assert "| A training step | right | **wrong** |" in text
    assert "- other, a step: wrong; dx: off by 1 \\| of its scale\n" in text
    assert "| other | 0 | 0 | 1 | a step |" in short


def test_memory_by_depth_and_size_and_its_picture(tmp_path):
    ways = ["plain", "revseg"]
    rows = memory_depth.rows_of([2, 4], ways, TOY) + memory_depth.rows_of([4], ways, (2, 8, 24, 10))
    rows += memory_depth.rows_of([8], ways, (4, 8, 12, 10))
    path = record.write("memory_depth", "?", rows, {"shape": list(TOY)}, tmp_path)
    text = report.readme(tmp_path)
    assert "| | depth 2 | depth 4 |" in text.replace("|  |", "| |")
    assert "2 x 8 x 12 x 10 | 2 x 8 x 24 x 10 | 4 x 8 x 12 x 10, depth 8 |" in text
    assert "From depth 2 to 4 the peak grows by: revseg" in text
    memory_depth.draw(record.read(path), tmp_path / "memory_depth.png")
    assert (tmp_path / "memory_depth.png").stat().st_size > 10_000
    assert "memory_depth.png" in report.overview(tmp_path)


def test_gradients_that_are_left_behind_are_not_counted():
    one, two = (memory_depth.rows_of([depth], ["revseg"], TOY)[0]["peak_mib"] for depth in (4, 32))
    assert two < one * 1.2  # of 28 blocks the gradients alone would be four times the peak


@pytest.mark.slow
def test_training_memory_and_its_tables(tmp_path, monkeypatch):
    measured = training_memory.measured

    def some(name, case, size):  # in a process each
        return measured(name, case, size) if case in ("plain", "lowest") else {"note": "not measured"}

    monkeypatch.setattr(training_memory, "measured", some)
    row = training_memory.row_of("vnet", (64, 128), most_gflops=100)
    plain, lowest = row["cases"]["plain"], row["cases"]["lowest"]
    assert plain["predicted_mib"][4] > 2 * lowest["predicted_mib"][4]
    assert plain["largest"]["12"] < lowest["largest"]["12"]
    assert abs(plain["off"]) < 0.03
    assert {"training", "validation"} <= lowest["measured"].keys()
    record.write("training_memory", "?", [row], {"overhead_mib": 500}, tmp_path)
    assert "| vnet | " in report.readme(tmp_path)
    assert "| vnet | " in report.overview(tmp_path)


def test_largest_batch_by_the_line():
    line = training_memory.law({1: 110.0, 2: 210.0, 4: 410.0})
    assert line == {"fixed": 10.0, "per_image": 100.0, "off": 0.0}
    budget = 12e9 / 2**20 - 500 - 16 * 1_000_000 / 2**20
    assert training_memory.largest_batch(line, 12, 1_000_000) == (budget - 10) // 100
    assert training_memory.largest_batch(line, 12, 10**9) == 0


@pytest.mark.slow
def test_scale_and_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "BASE", scale.BASE | {"height": 64, "width": 128, "channels": 64})
    monkeypatch.setitem(scale.SERIES, "batch", [{"batch": n} for n in (1, 2)])
    monkeypatch.setitem(scale.SERIES, "V modules", [{"modules": n} for n in (3, 6)])
    rows = [
        scale.row_of(series, level) | {"time": times.get(level, {})}
        for series in ("batch", "V modules")
        for times in [scale.times(series, 1)]
        for level in ("plain", "lowest")
    ]
    plain, lowest, deeper, flat = rows
    assert plain["predicted_mib"][2] > 1.9 * plain["predicted_mib"][1]
    assert abs(plain["predicted_mib"][2] / plain["measured_mib"][2] - 1) < 0.03
    assert plain["held"] < lowest["held"]
    assert deeper["law"]["slope"] > 10 * abs(flat["law"]["slope"])
    record.write("scale", "?", rows, {"base": scale.BASE, "card_gb": 80}, tmp_path)
    text = report.readme(tmp_path)
    assert "| batch, 1 to 2 | plain |" in text
    assert "no limit" in text


def test_what_a_file_has_is_not_measured_again(tmp_path, monkeypatch):
    shape = (1, 8, 6, 10)
    run = []

    def row(way, depth, shape, device, limit_gib):
        run.append((way, depth))
        peak = None if way == "compile" else 1.0 * depth
        return {
            "way": way,
            "depth": depth,
            "shape": list(shape),
            "peak_mib": peak,
            "saved_mib": 1.0,
            "note": "",
        }

    def main(*more):
        run.clear()
        arguments = ["--depths-only", "--shape", *map(str, shape), "--out", str(tmp_path), *more]
        measure.ask("memory_depth", arguments)
        found = record.read(tmp_path / "memory_depth.jsonl")["rows"]
        return [(each["way"], each["depth"]) for each in found]

    monkeypatch.setattr(memory_depth, "_alone", row)
    both = ["--ways", "plain", "compile", "--depths"]
    assert main(*both, "1") == [("plain", 1), ("compile", 1)]
    found = main("--missing", *both, "1", "2")
    assert run == [("compile", 1), ("plain", 2), ("compile", 2)]
    assert found == [("plain", 1), ("compile", 1), ("plain", 2), ("compile", 2)]
    assert main("--missing", "--ways", "revseg", "--depths", "2") == [*found[:3], ("revseg", 2), found[3]]
    assert run == [("revseg", 2)]
