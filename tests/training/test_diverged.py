"""A run whose numbers are not finite ends, and what it saved before is good."""

import math
from dataclasses import replace

import pytest

from revseg.training import loop, run, train
from revseg.training.checkpoint import load_checkpoint
from revseg.training.folder import DivergedError
from tests.training.tiny import TINY, weights

pytestmark = pytest.mark.usefixtures("quick")


def test_a_run_that_failed_before_its_first_checkpoint_can_be_started_again(tmp_path, monkeypatch):
    """The advice was --resume, which then said that there was nothing to resume."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "gradients", lambda *_: math.nan)
        with pytest.raises(DivergedError):
            train(replace(TINY, out=tmp_path))
    train(replace(TINY, out=tmp_path))


def test_diverged_loss_names_step_files_and_the_last_good_checkpoint(tmp_path, monkeypatch):
    real, calls = loop.gradients, []

    def diverge(*args):
        calls.append(None)
        return real(*args) * (math.inf if len(calls) == 4 else 1)

    monkeypatch.setattr(loop, "gradients", diverge)
    with pytest.raises(
        DivergedError,
        match=r"the loss became inf at step 2 of epoch 2, samples train_00000\d, train_00000\d; .*last\.pt holds the run",
    ):
        train(replace(TINY, epochs=2, out=tmp_path))
    state = load_checkpoint(tmp_path / "last.pt")
    assert (len(state["history"]), state["step"]) == (1, 0)
    assert all(p.isfinite().all() for p in state["model"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    real = loop.make_step

    def spoil(parts, settings):
        real(parts, settings)
        parts.model.classifier.weight.data.fill_(math.nan)

    monkeypatch.setattr(loop, "make_step", spoil)
    with pytest.raises(DivergedError, match="a weight is not finite after step 1 of epoch 1"):
        train(replace(TINY, save_steps=1, out=tmp_path))
    assert not (tmp_path / "last.pt").exists()


def test_weights_spoilt_by_the_last_step_are_not_saved(tmp_path, monkeypatch):
    real, calls = run.validate, []

    def spoil(model, *args):
        calls.append(None)
        if len(calls) == 2:
            model.classifier.weight.data.fill_(math.nan)
        return real(model, *args)

    monkeypatch.setattr(run, "validate", spoil)
    with pytest.raises(DivergedError, match=r"the validation loss became nan at epoch 2; .*last\.pt holds"):
        train(replace(TINY, epochs=2, out=tmp_path))
    assert all(p.isfinite().all() for p in weights(tmp_path).values())
