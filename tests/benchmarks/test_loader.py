"""The loader beside the steps: the question is asked and told."""

from benchmarks import measure, record, report
from benchmarks.questions import loader


def test_the_question_and_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "FRAMES", 8)
    monkeypatch.setattr(loader, "WORKERS", (0, 1))
    measure.ask("loader", ["--size", "32", "64", "--rounds", "1", "--out", str(tmp_path)])
    rows = record.read(tmp_path / "loader.jsonl")["rows"]
    assert [row["of"] for row in rows[:4]] == ["PNG", "PNG", "cache", "cache"]
    assert all(row["images_s"] > 0 for row in rows)
    assert "| cache, 1 process |" in report.readme(tmp_path)
