"""Runs that are cut off and resumed: what they leave is read and told, and what went wrong is a complaint."""

import json

import pytest

from benchmarks import measure, record, report
from benchmarks.questions import training_runs
from revseg.training import TrainSettings


def finished(words):
    """Leaves what a run leaves, as far as it is read."""
    out = words[words.index("--out") + 1]
    epoch = {
        "epoch": 1,
        "loss": 0.9,
        "val_loss": 0.8,
        "miou": 0.25,
        "iou": {"road": 0.5, "sky": None},
        "seconds": 1,
    }
    peaks = {"reversible": 2**20, "saved": 2**21}
    summary = {"parameters": 1, "peak_bytes": peaks, "predicted_peak_bytes": peaks, "best": epoch}
    training_runs.Path(out).mkdir(parents=True, exist_ok=True)
    (training_runs.Path(out) / "summary.json").write_text(json.dumps(summary))
    (training_runs.Path(out) / "log.jsonl").write_text(json.dumps(epoch) + "\n")

    class Process:
        def wait(self, limit):
            return 0

    return Process()


def test_what_runs_leave_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(training_runs, "cut_off", lambda words, out: {"code": 143, "epoch": 2, "step": 7})
    monkeypatch.setattr(training_runs, "revseg", finished)
    monkeypatch.setattr(training_runs, "same_weights", lambda *_: True)
    words = ["--root", "CamVid", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "results")]
    measure.ask("training_runs", words)
    camvid, scenes = record.read(tmp_path / "results/training_runs.jsonl")["rows"]
    assert camvid["command"].endswith("--root CamVid")
    assert scenes["same_as_straight"]
    text = report.readme(tmp_path / "results")
    assert (
        "| scenes | epoch 2, step 7 | 143 | yes, to the bit | 0.900 | 25.0 | 1.0 (1.0) | 2.0 (2.0) |" in text
    )
    assert not training_runs.complaints([camvid, scenes])
    assert training_runs.complaints(
        [{"run": "x", "code": 1, "resumed_code": 0, "same_as_straight": False}]
    ) == [
        "x: ended with 1, then 0",
        "x: other weights than without the stop",
    ]


@pytest.mark.parametrize("name", training_runs.RUNS)
def test_the_words_of_a_run_are_settings(name, tmp_path):
    from revseg.cli import _parsed, spelled_out

    words = training_runs.flags(name, tmp_path)[1:]
    assert isinstance(_parsed("train", TrainSettings, spelled_out(words, TrainSettings)), TrainSettings)
    with pytest.raises(SystemExit, match="needs --root"):
        training_runs.flags("camvid", None)
