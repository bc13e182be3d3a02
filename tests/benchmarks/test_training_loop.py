"""The training program beside a loop written out: both make the same step, and the question is asked and told."""

import torch

from benchmarks import measure, record, report
from benchmarks.questions import training_loop
from revseg.data.synthetic.dataset import SyntheticStreets
from revseg.training.settings import TrainSettings


def test_program_and_loop_make_the_same_steps():
    told = TrainSettings(size=(32, 64), batch=4, threads=1, model_args=("widths=4,8,16",))
    scenes = SyntheticStreets("train", size=(32, 64), samples=8)
    samples = training_loop.InMemory([scenes.load(i) for i in range(8)])
    program, bare = training_loop.epoch_of(told, samples)
    ours, theirs = program(), bare()
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_the_question_and_its_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "SIZES", ((32, 64),))
    measure.ask("training_loop", ["--rounds", "2", "--frames", "64", "128", "--out", str(tmp_path)])
    time, *memory = record.read(tmp_path / "training_loop.jsonl")["rows"]
    assert 0.2 < time["ratio"]["median"] < 5
    assert [row["precision"] for row in memory] == ["float32", "bfloat16"]
    images_and_labels = 4 * 4 * 64 * 128 / 2**20  # bytes
    assert all(row["kept_mib"] > images_and_labels for row in memory)
    text = report.readme(tmp_path)
    assert "| 4 x 3 x 64 x 128, float32 | " in text
    assert "| 4 x 3 x 32 x 64 | " in text
