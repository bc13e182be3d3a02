import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from rich.console import Console

from revseg.data import create_dataset
from revseg.files import CheckpointError, load_weights
from revseg.layers.recompute import Recompute
from revseg.losses import UpsampleCrossEntropy
from revseg.memory import peak_bytes
from revseg.models import create_model, load_model
from revseg.ops import upsample_cross_entropy
from revseg.training import TrainSettings, loop, results, run, train
from revseg.training.checkpoint import load_checkpoint
from revseg.training.folder import DivergedError
from revseg.training.lock import locked
from revseg.training.loop import validate
from revseg.training.settings import OUTPUTS
from revseg.training.setup import build_model, choose_device, class_weights, create_loader, create_split
from revseg.training.stop import StoppedError, watched_signals

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


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    threads = torch.get_num_threads()
    if "everything" not in request.node.name:
        quickly(monkeypatch)
    yield
    torch.set_num_threads(threads)


def weights(folder):
    return load_checkpoint(folder / "last.pt")["model"]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_training_learns_and_writes_everything(tmp_path):
    summary = train(replace(TINY, epochs=6, train_samples=8, out=tmp_path / "run"))
    out = tmp_path / "run"
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == sorted(OUTPUTS)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in log] == [1, 2, 3, 4, 5, 6]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert set(log[0]["iou"]) == set(create_dataset("synthetic", "val", samples=1).classes.names)
    assert log[0]["miou"] == pytest.approx(
        sum(v for v in log[0]["iou"].values() if v is not None)
        / sum(v is not None for v in log[0]["iou"].values())
    )
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["best"]["miou"] == max(record["miou"] for record in log)
    assert summary["peak_bytes"]["reversible"] < summary["peak_bytes"]["saved"]
    assert json.loads((out / "settings.json").read_text())["size"] == [32, 64]
    for name in ("samples.png", "curves.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100

    model = load_model(out / "best.safetensors")
    matrix, _ = validate(
        model, create_loader(create_split(TINY, "val"), TINY, shuffle=False), 19, torch.device("cpu")
    )
    assert matrix.mean_iou() == summary["best"]["miou"]


def test_learning_rate_follows_the_poly_schedule(tmp_path):
    train(replace(TINY, epochs=2, out=tmp_path / "run"))  # 2 steps an epoch
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [record["lr"] for record in log] == pytest.approx(
        [5e-3 * (1 - step / 4) ** 0.9 for step in (1, 3)]
    )


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


@pytest.mark.parametrize("workers", [0, 2])
def test_run_stopped_in_an_epoch_and_resumed_equals_the_straight_one_to_the_bit(
    tmp_path, monkeypatch, workers
):
    """With every option that has a state, and with another number of processes that load samples."""
    train(replace(EVERYTHING, out=tmp_path / "straight"))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(StoppedError, match=r"stopped by SIGTERM; saved at epoch 2, step 1") as stopped:
            train(replace(EVERYTHING, workers=workers, out=tmp_path / "stopped"))
    assert stopped.value.exit_code == 143
    train(replace(EVERYTHING, workers=2 - workers, out=tmp_path / "stopped", resume=True))
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


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


def test_same_seed_same_weights_other_seed_other_weights(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(replace(TINY, out=tmp_path / name, seed=seed))
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    name = "classifier.weight"
    assert not torch.equal(weights(tmp_path / "a")[name], weights(tmp_path / "c")[name])


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


def test_overwriting_keeps_the_old_run_until_the_new_one_has_something(tmp_path, monkeypatch):
    old = (*OUTPUTS, "epoch-0007.pt", "samples-0001.png", "notes.txt")
    for name in old:
        (tmp_path / name).write_text("old")
    settings = replace(TINY, out=tmp_path, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "gradients", lambda *_: math.nan)
        with pytest.raises(DivergedError, match="there is no checkpoint yet"):
            train(settings)
    assert {(tmp_path / name).read_text() for name in old} == {"old"}
    train(settings)
    assert (tmp_path / "notes.txt").read_text() == "old"
    assert sorted(
        path.name for path in tmp_path.iterdir() if path.name not in (".lock", "notes.txt")
    ) == sorted(name for name in OUTPUTS if name.rpartition(".")[2] != "png")
    assert len(load_checkpoint(tmp_path / "last.pt")["history"]) == 1


def test_a_run_that_failed_before_its_first_checkpoint_can_be_started_again(tmp_path, monkeypatch):
    """The advice was --resume, which then said that there was nothing to resume."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "gradients", lambda *_: math.nan)
        with pytest.raises(DivergedError):
            train(replace(TINY, out=tmp_path))
    train(replace(TINY, out=tmp_path))


def test_the_last_checkpoints_of_whole_epochs_are_kept(tmp_path):
    train(replace(TINY, epochs=3, keep=2, out=tmp_path))
    assert sorted(path.name for path in tmp_path.glob("epoch-*")) == ["epoch-0002.pt", "epoch-0003.pt"]
    assert load_checkpoint(tmp_path / "epoch-0002.pt")["history"][-1]["epoch"] == 2
    (tmp_path / "last.pt").write_bytes(b"damaged")
    with pytest.raises(
        CheckpointError, match=r"last\.pt is damaged.*; --resume .*epoch-0003\.pt goes on from"
    ):
        train(replace(TINY, epochs=3, out=tmp_path, resume=True))
    assert (
        train(replace(TINY, epochs=3, out=tmp_path, resume=tmp_path / "epoch-0002.pt"))["last"]["epoch"] == 3
    )


def test_a_failing_extra_costs_nothing_else(tmp_path, monkeypatch):
    """The comparison with stored activations does not fit where only the reversible step does."""

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name in ("compare_memory", "draw_curves", "draw_samples"):
        monkeypatch.setattr(results, name, fail)
    text = io.StringIO()
    train(replace(TINY, out=tmp_path), Console(file=text, width=200))
    for line in (
        "the memory is not compared: CUDA out",
        "curves.png is not drawn",
        "samples.png is not drawn",
    ):
        assert line in text.getvalue()
    assert json.loads((tmp_path / "summary.json").read_text())["last"]["epoch"] == 1


def test_only_what_fits_is_measured(monkeypatch):
    model, criterion = build_model(TINY, 3, save_activations=False), UpsampleCrossEntropy()
    batch = torch.zeros(1, 3, 32, 64, dtype=torch.uint8), torch.zeros(1, 32, 64, dtype=torch.uint8)
    monkeypatch.undo()
    monkeypatch.setattr(results, "free_bytes", lambda device: 10**9)
    peaks = results.compare_memory(model, criterion, batch, TINY, {"reversible": 10**6, "saved": 10**10})
    assert list(peaks) == ["reversible"]


def test_missing_packages_are_noticed_before_anything_is_done(tmp_path, monkeypatch):
    for missing in ("matplotlib", "safetensors"):
        monkeypatch.setattr(
            results, "find_spec", lambda name, missing=missing: None if name == missing else 1
        )
        with pytest.raises(ImportError, match=f"the package {missing} is missing"):
            train(replace(TINY, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


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


def test_validation_takes_less_memory_than_a_training_step():
    model = create_model("vnet")
    images = torch.randint(0, 256, (2, 3, 128, 256), dtype=torch.uint8)
    labels = torch.randint(0, 19, (2, 128, 256), dtype=torch.uint8)

    def step():
        model.zero_grad()
        upsample_cross_entropy(model(images), labels).backward()

    training_peak = peak_bytes(step, before=step)
    batches = [(images, labels)]
    assert peak_bytes(lambda: validate(model, batches, 19, torch.device("cpu"))) < 0.7 * training_peak


def test_enet_weights_are_high_for_rare_classes():
    dataset = create_split(TINY, "train")
    counts = sum(torch.bincount(label.flatten(), minlength=256)[:19] for _, label in dataset)
    shares = counts / counts.sum()
    torch.testing.assert_close(
        class_weights(dataset, "enet"), 1 / torch.log(1.02 + shares), rtol=1e-5, atol=0
    )


def test_class_weights_reach_the_loss(tmp_path):
    losses = [
        train(replace(TINY, out=tmp_path / kind, class_weights=kind))["last"]["loss"]
        for kind in ("none", "enet")
    ]
    assert losses[0] != losses[1]


def test_hyperparameters_reach_the_model():
    settings = replace(TINY, model_args=("widths=4,8,16", "coupling=additive", "classifier_bias=True"))
    model = build_model(settings, 3, save_activations=False)
    assert model.classifier.weight.shape == (3, 16, 1, 1)
    assert model.classifier.bias is not None


@pytest.mark.parametrize("save_activations", [False, True])
def test_every_network_can_be_trained_in_both_modes(save_activations, tmp_path):
    settings = replace(TINY, model="cgnet", model_args=("widths=4,16,32", "blocks=2,2"), out=tmp_path / "run")
    model = build_model(settings, 3, save_activations=save_activations)
    assert {m.save_activations for m in model.modules() if isinstance(m, Recompute)} == {save_activations}
    train(replace(settings, save_activations=save_activations))


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("gpu", "meta"):
        with pytest.raises(ValueError, match=f"unknown --device '{name}'; choose one of auto, cpu, cuda"):
            choose_device(name)
    with pytest.raises(ValueError, match=r"no --device cuda:99 here: torch sees \d+ GPUs"):
        choose_device("cuda:99")


@pytest.mark.parametrize("mode", ["exact", "lossless"])
def test_an_exact_run_ends_with_the_weights_of_its_plain_twin_bit_for_bit(mode, tmp_path):
    settings = replace(TINY, size=(48, 64), epochs=2, **{mode: True})
    train(replace(settings, out=tmp_path / "reversible"))
    train(replace(settings, out=tmp_path / "plain", save_activations=True))
    assert_same(weights(tmp_path / "reversible"), weights(tmp_path / "plain"))
    if mode == "lossless":  # and the network is the ordinary one
        train(replace(settings, out=tmp_path / "ordinary", lossless=False, save_activations=True))
        assert_same(weights(tmp_path / "reversible"), weights(tmp_path / "ordinary"))
