"""One image by every runtime: the question is asked and told."""

from benchmarks import measure, record, report
from benchmarks.questions import latency


def test_the_question_and_its_table(tmp_path):
    words = ["--networks", "vnet", "--ways", "modules", "pytorch", "--size", "32", "64", "--rounds", "2"]
    measure.ask("latency", [*words, "--out", str(tmp_path)])
    (row,) = record.read(tmp_path / "latency.jsonl")["rows"]
    assert (row["network"], row["size"], set(row["ways"])) == ("vnet", [32, 64], {"modules", "pytorch"})
    assert all(way["ms"] > 0 for way in row["ways"].values())
    text = report.readme(tmp_path)
    assert "|  | PyTorch | predict |" in text
    assert "(1.00)" in text
    assert latency._cell({"note": "no such module"}, 1.0) == "-"
