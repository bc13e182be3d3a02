"""`revseg benchmark`: times of what gives the right labels, and a reason for all else."""

import re

import torch

from revseg.cli import main
from revseg.commands import benchmark
from revseg.files import save_weights
from revseg.inference import runtimes
from revseg.models import create_model
from tests.helpers import refused


def test_runtimes_are_timed_or_named(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    weights = tmp_path / "w.safetensors"
    description = {"model": "vnet", "num_classes": 4, "hyperparameters": {}}
    save_weights(weights, create_model("vnet", 4).state_dict(), description)

    def wrong(network, image, any_size):
        return lambda x: -benchmark.pytorch(network, x)(x)

    def missing(network, image, any_size):
        raise ModuleNotFoundError("No module named 'onnxruntime'")

    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    monkeypatch.setitem(benchmark.RUNTIMES, "compile", wrong)
    monkeypatch.setitem(benchmark.RUNTIMES, "onnx", missing)
    assert main(["benchmark", str(weights), "--size", "32x64", "--rounds", "2", "--threads", "1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"compile was not timed: \d+\.\d % of the labels are others", out)
    assert "onnx was not timed: No module named 'onnxruntime'" in out
    assert "onnx-int8 was not timed: ONNX Runtime needs onnx" in out
    assert float(re.search(r"pytorch │ +([\d.]+) │", out)[1]) > 0


def test_runtimes_that_are_none_are_refused(capsys):
    message = refused(capsys, "benchmark", "vnet-camvid", "--runtimes", "tensorrt")
    assert "unknown runtime 'tensorrt'; choose some of pytorch" in message
