"""What a step is predicted to take, and what is said when it does not fit."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from revseg.data import SyntheticStreets
from revseg.training import loop, run, step_memory, train
from revseg.training.results import compare_memory, predict_both
from revseg.training.run import LoaderError
from revseg.training.setup import build_model, create_criterion
from revseg.training.step_memory import MemoryExhaustedError, advice, level_within
from tests.training.tiny import TINY

SETTINGS = replace(TINY, size=(128, 256), batch=4, val_samples=1)
SIZE = (128, 256)


@pytest.mark.parametrize(
    "given",
    [{}, {"precision": "bfloat16"}, {"memory": "fastest"}, {"loss": "ohem"}, {"loss": "lovasz"}],
    ids=str,
)
def test_the_prediction_is_near_the_measurement(given):
    """In the run's precision, with its loss, and at its memory level, which may store the activations of sequences."""
    settings = replace(SETTINGS, batch=2, **given)
    model, criterion = build_model(settings, 19, save_activations=False), create_criterion(settings, None)
    images, labels = torch.zeros(2, 3, *SIZE, dtype=torch.uint8), torch.zeros(2, *SIZE, dtype=torch.uint8)
    predicted = predict_both(settings, 19, (images, labels))
    measured = compare_memory(model, criterion, (images, labels), settings, predicted)
    assert measured == pytest.approx(predicted, rel=0.25)


def test_the_log_has_the_measured_peak_beside_the_predicted_one(tmp_path):
    """Of the second step, and found again when the run goes on."""
    settings = replace(SETTINGS, batch=2, train_samples=6, save_activations=True, out=tmp_path / "run")
    train(settings)
    train(replace(settings, epochs=2, resume=True))
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log[0]["peak_bytes"] == log[1]["peak_bytes"]
    assert log[0]["peak_bytes"] == pytest.approx(log[0]["predicted_peak_bytes"], rel=0.01)


def test_a_profiler_of_the_users_is_left_alone(tmp_path):
    with torch.profiler.profile():
        train(replace(SETTINGS, size=(32, 64), train_samples=8, out=tmp_path / "run"))
    assert json.loads((tmp_path / "run/log.jsonl").read_text())["peak_bytes"] is None


@pytest.fixture
def simple(monkeypatch):
    """A prediction that takes no time: so many bytes an image at each level."""
    each = {"least": 50, "lowest": 100, "balanced": 200, "fastest": 300}
    monkeypatch.setattr(
        step_memory, "predicted_step", lambda settings, *_: each[settings.memory] * settings.batch
    )
    return each


def test_a_budget_chooses_the_fastest_level_that_fits(simple):
    for level, each in simple.items():
        assert level_within(replace(SETTINGS, budget=f"{4 * each}B"), 19, SIZE).memory == level
    with pytest.raises(
        ValueError, match=r"no memory level of vnet fits --budget 199B: .*--memory least --batch 2 would"
    ):
        level_within(replace(SETTINGS, budget="199B"), 19, SIZE)
    assert "give a smaller --size" in advice(SETTINGS, 19, SIZE, 49)


def test_out_of_memory_says_the_peak_and_what_would_fit(tmp_path, monkeypatch, simple):
    monkeypatch.setattr(run, "predicted_peak", lambda *_: None)
    monkeypatch.setattr(run, "free_bytes", lambda _: 400)
    monkeypatch.setattr(loop, "make_step", lambda *_: torch.empty(2**60))
    with pytest.raises(
        MemoryExhaustedError,
        match=r"out of memory on cpu: a step at --memory balanced --batch 4 is predicted to take .* MiB; "
        r"--memory lowest --batch 4 would take .* MiB",
    ):
        train(replace(SETTINGS, out=tmp_path))


def test_a_dry_run_says_the_plan_and_makes_nothing(tmp_path, capsys):
    plan = train(replace(SETTINGS, accumulate=2, batch=1, dry_run=True, out=tmp_path / "run"))
    assert plan["steps of an epoch"] == 2
    assert plan["samples of a step"] == 2
    assert plan["predicted_peak_bytes"] > 2**16
    assert "predicted peak" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_loader_that_is_killed_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "predicted_peak", lambda *_: None)
    real, parent = SyntheticStreets.load, os.getpid()

    def load(self, index):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, index)

    monkeypatch.setattr(SyntheticStreets, "load", load)
    with pytest.raises(
        LoaderError, match="a process that loads samples has died, perhaps for want of memory"
    ):
        train(replace(SETTINGS, size=(32, 64), workers=1, out=tmp_path))


def test_tensorboard_and_pictures(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="an extra")
    monkeypatch.setattr(run, "predicted_peak", lambda *_: None)
    monkeypatch.setattr(run, "write_results", lambda *_: {})
    train(replace(SETTINGS, size=(32, 64), epochs=2, batch=2, log=("tensorboard",), pictures=2, out=tmp_path))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert "iou/road" in events.Tags()["scalars"]
    assert sorted(path.name for path in tmp_path.glob("samples-*.png")) == ["samples-0002.png"]
