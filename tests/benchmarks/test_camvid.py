"""The training runs on CamVid: finished ones are read, others are made, the report says what they say."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import measure, record, report
from benchmarks.questions import camvid

LOSSES = {"camvid-180-reversible": (0.9, 0.5), "camvid-180-saved": (0.88, 0.5)}


def finished_run(folder, run, losses):
    """The files that `revseg train` leaves, as far as they are read."""
    (folder / run).mkdir(parents=True)
    size = [int(each) for each in camvid.RUNS[run][1:3]]
    epochs = [
        {
            "epoch": i,
            "loss": loss,
            "val_loss": loss,
            "miou": 1 - loss,
            "iou": {"road": 0.75, "sky": None},
            "seconds": 2,
        }
        for i, loss in enumerate(losses, start=1)
    ]
    summary = {
        "settings": {"root": "CamVid", "size": size, "save_activations": "saved" in run, "out": "runs/x"},
        "parameters": 161248,
        "peak_bytes": {"reversible": 2**20, "saved": 3 * 2**20},
        "seconds": 4.0,
        "torch": "2.13.0",
        "device": "cpu",
        "best": epochs[-1],
    }
    (folder / run / "summary.json").write_text(json.dumps(summary))
    (folder / run / "log.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))


def collect(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    measure.ask("camvid", ["--root", "CamVid", "--out", str(folder / "results"), "--names", *arguments])
    return record.read(folder / "results" / "camvid.jsonl")


def test_finished_runs_are_read_and_reported(tmp_path, monkeypatch):
    for run, losses in LOSSES.items():
        finished_run(tmp_path / "runs", run, losses)
    monkeypatch.setattr(camvid, "finish", lambda *_: pytest.fail("a finished run was repeated"))
    monkeypatch.setattr(record, "commit", lambda: record.AT_START)
    result = collect(monkeypatch, tmp_path, *LOSSES, "--commit", "abc")
    assert [row["mode"] for row in result["rows"]] == ["reversible", "saved"]
    assert [row["peak_bytes"] for row in result["rows"]] == [2**20, 3 * 2**20]
    assert [epoch["loss"] for epoch in result["rows"][0]["epochs"]] == [0.9, 0.5]
    assert str(tmp_path) not in json.dumps(result["rows"])
    text = report.readme(tmp_path / "results")
    assert "|  | 180 x 240 reversible | 180 x 240 saved |" in text
    assert "| road | 75.0 | 75.0 |" in text
    assert "| sky | - | - |" in text
    assert "at most 0.0200 in the training loss of an epoch and 2.0 points of mIoU, -1.00 on average" in text
    assert "--size 180 240 --epochs 20 --save-activations` at commit abc" in text
    assert Image.open(tmp_path / "results" / "camvid.png").size > (1000, 400)


def test_a_mode_alone_is_not_compared(tmp_path):
    finished_run(tmp_path, "camvid-360-reversible", (0.9, 0.5))
    row = camvid.row_of("camvid-360-reversible", tmp_path, tmp_path)
    assert camvid.comparison({"rows": [row]}) == ""


@pytest.mark.slow
def test_a_run_is_made_and_one_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    for split in ("train", "val"):
        for kind, shape in (("", (20, 24, 3)), ("annot", (20, 24))):
            (tmp_path / "CamVid" / (split + kind)).mkdir(parents=True)
            for i in range(2):
                pixels = np.random.default_rng(i).integers(0, 11, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "CamVid" / (split + kind) / f"{i}.png")
    monkeypatch.setenv("PYTHONPATH", str(record.ROOT))
    monkeypatch.setitem(camvid.RUNS, "toy", ("--size", "16", "24", "--epochs", "2", "--batch", "2"))
    (row,) = collect(monkeypatch, tmp_path, "toy")["rows"]
    assert len(row["epochs"]) == 2
    (tmp_path / "runs" / "toy" / "summary.json").unlink()
    (again,) = collect(monkeypatch, tmp_path, "toy")["rows"]
    assert again["epochs"] == row["epochs"]
