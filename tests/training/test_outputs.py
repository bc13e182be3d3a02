"""What a run leaves in its folder, and what it does where a part of that fails."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from rich.console import Console

from revseg.data import create_dataset
from revseg.files import CheckpointError
from revseg.losses import UpsampleCrossEntropy
from revseg.models import load_model
from revseg.training import loop, results, train
from revseg.training.checkpoint import load_checkpoint
from revseg.training.folder import DivergedError
from revseg.training.loop import validate
from revseg.training.settings import OUTPUTS
from revseg.training.setup import build_model, create_loader, create_split
from tests.training.tiny import TINY


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


@pytest.mark.usefixtures("quick")
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


@pytest.mark.usefixtures("quick")
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


@pytest.mark.usefixtures("quick")
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
    monkeypatch.setattr(results, "free_bytes", lambda device: 10**9)
    peaks = results.compare_memory(model, criterion, batch, TINY, {"reversible": 10**6, "saved": 10**10})
    assert list(peaks) == ["reversible"]


@pytest.mark.usefixtures("quick")
def test_missing_packages_are_noticed_before_anything_is_done(tmp_path, monkeypatch):
    for missing in ("matplotlib", "safetensors"):
        monkeypatch.setattr(
            results, "find_spec", lambda name, missing=missing: None if name == missing else 1
        )
        with pytest.raises(ImportError, match=f"the package {missing} is missing"):
            train(replace(TINY, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
