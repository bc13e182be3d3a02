"""A run that is stopped goes on as if it had not been; what would give other numbers is refused."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch

from revseg.files import load_weights
from revseg.training import loop, train
from revseg.training.checkpoint import load_checkpoint
from revseg.training.lock import locked
from revseg.training.stop import StoppedError, watched_signals
from tests.training.tiny import TINY, assert_same, quickly

pytestmark = pytest.mark.usefixtures("quick")


def stop_after(monkeypatch, steps, number=signal.SIGTERM):
    """Sends the process, and those that load its samples, a signal in its step of that number."""
    real, calls = loop.make_step, []

    def make_step(*args):
        calls.append(None)
        if len(calls) == steps:
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                os.kill(process.pid, number)
        real(*args)

    monkeypatch.setattr(loop, "make_step", make_step)


EVERYTHING = replace(
    TINY,
    epochs=2,
    size=(40, 64),
    train_samples=8,
    accumulate=2,
    model_args=("widths=4,8,16", "dropout=0.2"),
    optimizer="adamw",
    schedule="cosine",
    warmup=2,
    clip=1.0,
    ema=0.9,
    precision="float16",
    class_weights="erfnet",
    loss="ohem",
    label_smoothing=0.1,
    crop=(32, 48),
    scale=(0.8, 1.2),
    photometric="mild",
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        quickly(patch)
        train(replace(EVERYTHING, out=folder))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_run_stopped_in_an_epoch_and_resumed_equals_the_straight_one_to_the_bit(
    straight, tmp_path, monkeypatch, workers
):
    """With every option that has a state, and with another number of processes that load samples."""
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(StoppedError, match=r"stopped by SIGTERM; saved at epoch 2, step 1") as stopped:
            train(replace(EVERYTHING, workers=workers, out=tmp_path / "stopped"))
    assert stopped.value.exit_code == 143
    assert not multiprocessing.active_children()  # though the traceback keeps the iterator of the loader
    train(replace(EVERYTHING, workers=2 - workers, out=tmp_path / "stopped", resume=True))
    assert_same_run(straight, tmp_path / "stopped")


def assert_same_run(one, other):
    """Weights, optimizer, scaler, averages, generators and log of two runs are the same to the bit."""
    a, b = (load_checkpoint(folder / "last.pt") for folder in (one, other))
    for key in ("model", "ema"):
        assert_same(a[key], b[key])
    for p, q in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
        assert_same(p, q)
    assert a["scaler"] == b["scaler"]
    assert torch.equal(a["random"][0]["torch"], b["random"][0]["torch"])
    for run_a, run_b in zip(a["history"], b["history"], strict=True):
        assert {**run_a, "seconds": 0} == {**run_b, "seconds": 0}
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (one, other)]
    assert [json.loads(line)["loss"] for line in logs[0]] == [json.loads(line)["loss"] for line in logs[1]]
    best = [load_weights(folder / "best.safetensors")[0] for folder in (one, other)]
    assert_same(*best)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_every_signal_saves_and_has_its_code(name, tmp_path, monkeypatch):
    number, before = getattr(signal, name), signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as patch:
        stop_after(patch, 1, number)
        with pytest.raises(StoppedError, match=f"stopped by {name}; saved at epoch 1, step 1") as stopped:
            train(replace(TINY, out=tmp_path))
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) == before
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 1


def test_a_signal_that_is_ignored_stays_so(tmp_path, monkeypatch):
    """As SIGHUP is under nohup."""
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    with watched_signals():
        assert signal.signal(signal.SIGHUP, signal.SIG_DFL) == signal.SIG_DFL


def test_finished_run_resumes_to_its_report(tmp_path):
    first = train(replace(TINY, out=tmp_path / "run"))
    (tmp_path / "run/summary.json").unlink()
    again = train(replace(TINY, out=tmp_path / "run", resume=True))
    assert again["last"] == first["last"]
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 1


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of one epoch; tests copy it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        quickly(patch)
        train(replace(TINY, out=folder))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.1}, r"--lr was 0.005 and is now 0.1, which gives other numbers; --allow-change lr"),
        ({"save_activations": True}, "--save-activations was False and is now True"),
        ({"memory": "lowest"}, "--memory was balanced and is now lowest"),
        ({"threads": 2}, "threads was 1 and is now 2"),
        ({"train_samples": 3}, r"train_samples was 4 samples \(.*\) and is now 3 samples"),
        ({"seed": 1}, "--seed was 0 and is now 1"),
        ({"precision": "bfloat16"}, "--precision was float32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_change_the_numbers_is_refused_on_resume(finished, tmp_path, change, message):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run/last.pt").read_bytes()
    with pytest.raises(ValueError, match=r"cannot resume .*last\.pt: " + message):
        train(replace(TINY, epochs=2, out=tmp_path / "run", resume=True, **change))
    assert (tmp_path / "run/last.pt").read_bytes() == before


def test_what_is_allowed_may_change_on_resume_and_epochs_may_grow(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    settings = replace(TINY, epochs=2, memory="lowest", out=tmp_path / "run", allow_change=("memory",))
    assert train(replace(settings, resume=tmp_path / "run/last.pt"))["last"]["epoch"] == 2
    with pytest.raises(ValueError, match="--epochs was 2 and may only grow, got 1"):
        train(replace(settings, epochs=1, resume=True))


def test_threads_are_those_of_the_run_that_goes_on(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    torch.set_num_threads(2)
    train(replace(TINY, epochs=2, out=tmp_path / "run", threads=None, resume=True))
    assert torch.get_num_threads() == 1


def test_a_run_may_go_on_in_another_folder(finished, tmp_path):
    train(replace(TINY, epochs=2, out=tmp_path / "more", resume=finished))
    assert len(load_checkpoint(tmp_path / "more/last.pt")["history"]) == 2
    assert (tmp_path / "more/best.safetensors").exists()
    assert len(load_checkpoint(finished / "last.pt")["history"]) == 1


def test_only_one_run_at_a_time_writes_to_a_folder(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    with (
        locked(tmp_path / "run"),
        pytest.raises(ValueError, match="another run of this process is writing to"),
    ):
        train(replace(TINY, epochs=2, out=tmp_path / "run", resume=True))
    holder = os.fork()
    if not holder:  # another process
        try:
            with locked(tmp_path / "run"):
                (tmp_path / "ready").touch()
                time.sleep(60)
        finally:
            os._exit(1)  # it must not go on as the tests of its parent
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match=rf"another process \({holder}\) is writing to"):
        train(replace(TINY, epochs=2, out=tmp_path / "run", resume=True))
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert train(replace(TINY, epochs=2, out=tmp_path / "run", resume=True))["last"]["epoch"] == 2
