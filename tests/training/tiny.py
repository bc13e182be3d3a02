"""Runs of a tiny VNet: their settings, and what two of them are compared by."""

import torch

from revseg.training import TrainSettings, results, run
from revseg.training.checkpoint import load_checkpoint

TINY = TrainSettings(
    size=(32, 64),
    train_samples=4,
    val_samples=2,
    batch=2,
    epochs=1,
    lr=5e-3,
    model_args=("widths=4,8,16",),
    threads=1,  # of tiny maps, two threads only wait for each other
)


def quickly(monkeypatch):
    """Leaves out what is slow: predicting and measuring memory, and drawing."""
    monkeypatch.setattr(results, "predict_both", lambda *_: {"reversible": 1, "saved": 2})
    monkeypatch.setattr(results, "compare_memory", lambda *_: {"reversible": 1, "saved": 2})
    monkeypatch.setattr(results, "draw_curves", lambda *_: None)
    monkeypatch.setattr(results, "draw_samples", lambda *_: None)
    monkeypatch.setattr(run, "predicted_peak", lambda *_: None)


def weights(folder):
    return load_checkpoint(folder / "last.pt")["model"]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
