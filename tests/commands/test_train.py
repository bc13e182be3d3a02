import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from revseg.commands import train as training
from revseg.commands.train import train
from revseg.data import create_dataset
from revseg.layers.recompute import Recompute
from revseg.memory import peak_bytes
from revseg.models import create_model, load_model
from revseg.ops import upsample_cross_entropy
from revseg.training.checkpoint import load_checkpoint
from revseg.training.loop import DivergedError
from revseg.training.random_state import seed_epoch
from revseg.training.settings import OUTPUTS, TrainSettings
from revseg.training.setup import build_model, choose_device, create_loader, create_split, enet_class_weights

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


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    """Leaves out what is slow and not asked about: measuring memory and drawing."""
    threads = torch.get_num_threads()
    if "everything" not in request.node.name:
        monkeypatch.setattr(training, "compare_memory", lambda *_: {"reversible": 1, "saved": 2})
        monkeypatch.setattr(training, "draw_curves", lambda *_: None)
        monkeypatch.setattr(training, "draw_samples", lambda *_: None)
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
    assert sorted(path.name for path in out.iterdir()) == sorted(OUTPUTS)
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
    matrix, _ = training.validate(
        model, create_loader(create_split(TINY, "val"), TINY, shuffle=False), 19, torch.device("cpu")
    )
    assert matrix.mean_iou() == summary["best"]["miou"]


def test_learning_rate_follows_the_poly_schedule(tmp_path):
    train(replace(TINY, epochs=2, out=tmp_path / "run"))  # 2 steps an epoch
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [record["lr"] for record in log] == pytest.approx(
        [5e-3 * (1 - step / 4) ** 0.9 for step in (1, 3)]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_equals_the_straight_one_to_the_bit(tmp_path, monkeypatch, workers):
    settings = replace(TINY, epochs=2, workers=workers, model_args=("widths=4,8,16", "dropout=0.2"))
    train(replace(settings, out=tmp_path / "straight"))

    real, calls = training.validate, []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 2:  # the steps of epoch 2 are done by now, and lost
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(replace(settings, out=tmp_path / "stopped"))
    train(replace(settings, out=tmp_path / "stopped", resume=True))

    straight, stopped = (load_checkpoint(tmp_path / name / "last.pt") for name in ("straight", "stopped"))
    assert_same(straight["model"], stopped["model"])
    for p, q in zip(
        straight["optimizer"]["state"].values(), stopped["optimizer"]["state"].values(), strict=True
    ):
        assert_same(p, q)
    assert torch.equal(straight["random"]["torch"], stopped["random"]["torch"])
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("straight", "stopped")]
    timeless = [[{**json.loads(line), "seconds": 0} for line in log] for log in logs]
    assert timeless[0] == timeless[1]


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


def test_memory_mode_may_change_on_resume_but_no_other_setting(tmp_path):
    train(replace(TINY, out=tmp_path / "run"))
    assert (
        len(train(replace(TINY, out=tmp_path / "run", resume=True, save_activations=True))["best"]["iou"])
        == 19
    )
    with pytest.raises(ValueError, match=r"cannot resume .*last\.pt: --lr was 0\.005 and is now 0\.1"):
        train(replace(TINY, out=tmp_path / "run", resume=True, lr=0.1))


def test_overwriting_removes_the_old_run_and_nothing_else(tmp_path):
    for name in (*OUTPUTS, "notes.txt"):
        (tmp_path / name).write_text("old")
    train(replace(TINY, out=tmp_path, overwrite=True))
    assert (tmp_path / "notes.txt").read_text() == "old"
    assert len(load_checkpoint(tmp_path / "last.pt")["history"]) == 1


def test_diverged_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    settings = replace(TINY, epochs=2, out=tmp_path)
    real, calls = training.UpsampleCrossEntropy.forward, []

    def diverge(self, *args):
        calls.append(None)
        return real(self, *args) * (math.inf if len(calls) == 4 else 1)

    monkeypatch.setattr(training.UpsampleCrossEntropy, "forward", diverge)
    with pytest.raises(
        DivergedError, match=r"became inf at step 4, epoch 2; last\.pt holds the end of epoch 1"
    ):
        train(settings)
    state = load_checkpoint(tmp_path / "last.pt")
    assert len(state["history"]) == 1
    assert all(p.isfinite().all() for p in state["model"].values())


def test_weights_spoilt_by_the_last_step_are_not_saved(tmp_path, monkeypatch):
    real, calls = training.validate, []

    def spoil(model, *args):
        calls.append(None)
        if len(calls) == 2:
            model.classifier.weight.data.fill_(math.nan)
        return real(model, *args)

    monkeypatch.setattr(training, "validate", spoil)
    with pytest.raises(DivergedError, match=r"validation loss became nan at step 4, epoch 2; last\.pt holds"):
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
    assert (
        peak_bytes(lambda: training.validate(model, batches, 19, torch.device("cpu"))) < 0.7 * training_peak
    )


def test_order_depends_on_seed_and_epoch_only():
    loader = create_loader(create_split(TINY, "train"), TINY, shuffle=True)

    def order(epoch):
        seed_epoch(loader, 0, epoch)
        return list(loader.sampler)

    first = order(0)
    torch.rand(5)
    assert order(0) == first
    assert any(order(epoch) != first for epoch in range(1, 6))


def test_enet_weights_are_high_for_rare_classes():
    dataset = create_split(TINY, "train")
    counts = sum(torch.bincount(label.flatten(), minlength=256)[:19] for _, label in dataset)
    shares = counts / counts.sum()
    torch.testing.assert_close(enet_class_weights(dataset), 1 / torch.log(1.02 + shares), rtol=1e-5, atol=0)


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
    settings = replace(TINY, size=(64, 96), epochs=2, threads=2, **{mode: True})
    train(replace(settings, out=tmp_path / "reversible"))
    train(replace(settings, out=tmp_path / "plain", save_activations=True))
    assert_same(weights(tmp_path / "reversible"), weights(tmp_path / "plain"))
    if mode == "lossless":  # and the network is the ordinary one
        train(replace(settings, out=tmp_path / "ordinary", lossless=False, save_activations=True))
        assert_same(weights(tmp_path / "reversible"), weights(tmp_path / "ordinary"))
