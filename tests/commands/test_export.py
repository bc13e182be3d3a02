"""`revseg export`: what is written is run, and compared, before it gets its name."""

import importlib.util

import pytest
import torch

from revseg.cli import main
from revseg.files import save_weights
from revseg.inference.export import FORMATS, ExportError, export
from revseg.models import create_model

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

    with pytest.raises(ExportError, match="--no-dynamic writes a file for this size alone"):
        export(Sized(), tmp_path / "x.ts", "torchscript", (32, 64), dynamic=True, labels=False)
    assert export(Sized(), tmp_path / "x.ts", "torchscript", (32, 64), dynamic=False, labels=False) == 0
