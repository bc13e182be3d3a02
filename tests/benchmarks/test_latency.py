"""One image by every runtime: the question is asked and told."""

from benchmarks import measure, record, report
from benchmarks.questions import latency
from revseg.inference.runtimes import RUNTIMES, pytorch


def test_the_question_and_its_table(tmp_path, monkeypatch):
    monkeypatch.setitem(RUNTIMES, "onnx", pytorch)  # which needs no seconds
    ways = ("modules", "pytorch", "predict")
    words = ["--networks", "vnet", "--ways", *ways, "--size", "32", "64", "--rounds", "2"]
    measure.ask("latency", [*words, "--out", str(tmp_path)])
    (row,) = record.read(tmp_path / "latency.jsonl")["rows"]
    assert (row["network"], row["size"], set(row["ways"])) == ("vnet", [32, 64], set(ways))
    assert all(way["ms"] > 0 for way in row["ways"].values())
    text = report.readme(tmp_path)
    assert "|  | PyTorch | batch norm folded | predict |" in text
    assert "(1.00)" in text
    assert latency._cell({"note": "no such module"}, 1.0) == "-"
