"""The table of all networks: counted, timed by each runtime and drawn."""

import pytest
import torch

from benchmarks import inference, measure, process, record, report

SIZES = ["--size", "32", "64", "--rounds", "1", "--threads", "1"]
needs_onnx = pytest.mark.skipif(
    not inference.has_onnx(), reason="onnx, onnxscript and onnxruntime: python -m benchmarks.peers"
)


@pytest.fixture
def rows_of(tmp_path):
    """Asks the question, and gives the rows in its file by network."""

    def run(*arguments):
        measure.ask("networks", [*SIZES, *arguments, "--out", str(tmp_path)])
        return {row["network"]: row for row in record.read(tmp_path / "networks.jsonl")["rows"]}

    return run


def test_networks_are_counted_timed_and_drawn(tmp_path, rows_of):
    rows_of("--runtimes", "eager", "--names", "vnet")
    rows = rows_of("--rounds", "0", "--names", "enet", "bisenet_xception39")
    assert list(rows) == ["bisenet_xception39", "enet", "vnet"]  # as the paper's table has them
    assert (rows["vnet"]["parameters"], rows["vnet"]["gflops"]) == (162_272, 12.7)
    assert (rows["enet"]["parameters"], rows["enet"]["gflops"]) == (364_311, 31.4)
    assert rows["bisenet_xception39"]["parameters"] == 1_541_963
    eager = rows["vnet"]["inference"]["eager"]
    assert eager["difference"] == 0
    assert eager["ratio"]["median"] > 0
    assert eager["fps"] == pytest.approx(1e3 / eager["ms"], rel=0.01)
    text = report.readme(tmp_path)
    assert "| bisenet_xception39 | 1.542 | 5.8 [1] | 55.5 |" in text
    assert "one image of 32 x 64 on a CPU, 1 threads" in text
    assert f"| vnet | 0.162 | 0.16 | 12.7 | {eager['fps']:.1f}; " in text
    assert (
        f"| vnet | 0.162 | 0.16 | 12.7 | {eager['fps']:.1f} | not run | not run | 37.4 |"
        in report.overview(tmp_path)
    )


def test_measuring_one_again_keeps_the_other_rows_of_the_same_conditions(rows_of):
    first = rows_of("--runtimes", "eager", "--names", "vnet", "--rounds", "0")
    second = rows_of("--runtimes", "eager", "--names", "enet", "--rounds", "0")
    assert second["vnet"] == first["vnet"]
    assert {"date", "commit"} <= set(second["enet"])
    with pytest.raises(ValueError, match="give another --out"):
        rows_of("--names", "vnet", "--rounds", "0", "--size", "64", "64")


def test_a_runtime_that_fails_or_is_wrong_gets_a_note_and_no_time(monkeypatch):
    def broken(model, images):
        raise RuntimeError("no such operator")

    def wrong(model, images):
        return lambda x: 1.01 * model(x)

    monkeypatch.setattr(inference, "RUNTIMES", {"broken": broken, "wrong": wrong})
    assert inference.measure("vnet", "broken", (32, 64), 1) == {"note": "RuntimeError: no such operator"}
    found = inference.measure("vnet", "wrong", (32, 64), 1)
    assert found["note"] == "off by 0.01 of the largest logit"
    assert "ms" not in found


def test_a_process_that_dies_loses_one_runtime(monkeypatch):
    answers = [([{"eager": {"ms": 1}}], "the process ended with -11"), ([{"compile": {"ms": 2}}], "")]
    monkeypatch.setattr(process, "run", lambda *arguments, **options: answers.pop(0))
    found = inference.in_new_process("vnet", (32, 64), 1, 1)
    assert found == {
        "eager": {"ms": 1},
        "onnx": {"note": "the process ended with -11"},
        "compile": {"ms": 2},
    }


@needs_onnx
def test_onnx_runtime_is_timed_and_agrees():
    found = inference.measure("vnet", "onnx", (32, 64), 1)
    assert found["difference"] < 1e-5
    assert found["fps"] > 0


@pytest.mark.slow
def test_the_compiled_network_is_timed_and_agrees():
    found = inference.in_new_process("vnet", (32, 64), 1, 1, ["compile"])["compile"]
    assert found["difference"] < 1e-5
    assert found["prepare_s"] > 0


def test_logits_that_are_not_finite_are_no_agreement():
    assert not inference.difference(torch.tensor([torch.nan]), torch.ones(1)) <= inference.LARGEST


def test_networks_that_are_all_measured_again_may_come_from_another_machine(tmp_path):
    path = record.write("networks", "?", [{"network": "vnet"}, {"network": "enet"}], {"threads": 2}, tmp_path)
    assert list(record.kept_rows(path, "network", ["enet"], {"threads": 2})) == ["vnet"]
    path.write_text(path.read_text().replace('"cpu": "', '"cpu": "another '))
    assert record.kept_rows(path, "network", ["vnet", "enet"], {"threads": 2}) == {}
    with pytest.raises(ValueError, match="has rows of"):
        record.kept_rows(path, "network", ["enet"], {"threads": 2})
