"""`revseg export`: what is written is run, and compared, before it gets its name."""

import importlib.util
import re

import pytest
import torch

from revseg.cli import main
from revseg.data import CITYSCAPES, create_dataset
from revseg.files import save_weights
from revseg.inference.export import FORMATS, Deployed, ExportError, export, run_onnx, write_onnx
from revseg.inference.folded import folded
from revseg.inference.int8 import write_int8
from revseg.inference.trained import load
from revseg.models import create_model
from tests.helpers import refused

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the extra `export` is not installed",
)


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    description = {"model": "vnet", "num_classes": 4, "hyperparameters": {}}
    save_weights(tmp_path / "w.safetensors", create_model("vnet", 4).state_dict(), description)
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize("format", ["torchscript", pytest.param("onnx", marks=needs_onnx)])
def test_a_file_takes_any_size(format, weights, tmp_path, capsys):
    words = ["--format", format, "--size", "64", "96", "--threads", "1"]
    assert main(["export", str(weights), *words]) == 0
    ending, _, run = FORMATS[format]
    images = torch.randint(0, 256, (3, 3, 80, 56), dtype=torch.uint8)
    labels = run(weights.with_suffix(ending))(images)
    assert labels.shape == (3, 80, 56)
    assert labels.dtype == torch.uint8
    assert main(["export", str(weights), *words]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_file_that_is_wrong_gets_no_name(weights, tmp_path, monkeypatch, capsys):
    ending, write, run = FORMATS["torchscript"]

    def wrong(path):
        good = run(path)
        return lambda images: good(images) + 1

    monkeypatch.setitem(FORMATS, "torchscript", (ending, write, wrong))
    assert (
        main(["export", str(weights), "--format", "torchscript", "--size", "64", "96", "--threads", "1"]) == 1
    )
    assert "gives other results on images 2 x 3 x 64 x 96" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.safetensors"]


def test_layers_that_depend_on_the_size_are_refused(tmp_path):
    class Sized(torch.nn.Module):
        stride = 1

        def forward(self, images):
            return images.float() * torch.linspace(0, 1, int(images.shape[3]))

    class Broken(Sized):
        def forward(self, images):
            raise NotImplementedError("of its own")

    with pytest.raises(ExportError, match=r"torch cannot export this network as torchscript: .*of its own"):
        export(Broken(), tmp_path / "x.ts", "torchscript", (32, 64), dynamic=False, labels=False)
    with pytest.raises(
        ExportError,
        match=r"the file does not run on images 1 x 3 x 72 x 56: .*--no-dynamic writes a file for this size",
    ):
        export(Sized(), tmp_path / "x.ts", "torchscript", (32, 64), dynamic=True, labels=False)
    assert export(Sized(), tmp_path / "x.ts", "torchscript", (32, 64), dynamic=False, labels=False) == 0


@needs_onnx
def test_integers_and_their_price(tmp_path, capsys):
    """The file takes any size; the words tell the mIoU that a run over the same images gives."""
    model, val = load("vnet-camvid"), create_dataset("synthetic", "val", size=(64, 128), samples=2)
    whole, part = tmp_path / "whole.onnx", tmp_path / "int8.onnx"
    images = [image for image, _ in val]
    with torch.no_grad():
        write_onnx(Deployed(folded(model.network), True).eval(), torch.stack(images), whole, True)
    write_int8(whole, part, images)
    assert part.stat().st_size < 0.7 * whole.stat().st_size
    ours, theirs = (run_onnx(path) for path in (part, whole))
    for image in (images[0], images[1][:, :48, :72].contiguous()):
        assert (ours(image[None]) == theirs(image[None])).double().mean() > 0.9
    with pytest.raises(ValueError, match="expected images to take the ranges of the maps from, got none"):
        write_int8(whole, part, [])


@needs_onnx
def test_integers_by_the_command(tmp_path, capsys):
    torch.manual_seed(0)
    description = {"model": "vnet", "num_classes": 19, "hyperparameters": {"widths": (4, 8, 16)}}
    description |= {"classes": list(CITYSCAPES.names)}
    network = create_model("vnet", 19, widths=(4, 8, 16))
    save_weights(tmp_path / "w.safetensors", network.state_dict(), description)
    words = ["--size", "64", "96", "--int8", "--samples", "2", "--threads", "1"]
    assert main(["export", str(tmp_path / "w.safetensors"), *words]) == 0
    assert re.search(
        r"int8: mIoU \d+\.\d\d % on 2 validation images, float32", " ".join(capsys.readouterr().out.split())
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.int8.onnx", "w.safetensors"]


def test_integers_want_the_data_of_the_network(weights, capsys):
    assert main(["export", str(weights), "--int8", "--samples", "2"]) == 2
    assert "the network tells apart 4 classes" in capsys.readouterr().err
    message = refused(capsys, "export", weights, "--int8", "--format", "torchscript")
    assert "--int8 goes with --format onnx" in message
