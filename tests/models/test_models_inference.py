"""Every network in evaluation is one graph for torch.compile, and runs in ONNX Runtime with its own numbers."""

import pytest
import torch

from benchmarks import inference
from tests.models.test_models_contract import each_model, images, network

SIZE = (64, 96)


@each_model
def test_in_evaluation_it_is_one_graph(name):
    torch.compiler.reset()
    model, x = network(name).eval(), images(1, SIZE)
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(x)
        assert inference.difference(found, model(x)) < 1e-5
    torch.compiler.reset()


@pytest.mark.skipif(
    not inference.has_onnx(), reason="onnx, onnxscript and onnxruntime: python -m benchmarks.peers"
)
@each_model
def test_onnx_runtime_gives_its_logits(name):
    model, x = network(name).eval(), images(1, SIZE)
    with torch.no_grad():
        assert inference.difference(inference.onnx(model, x)(x), model(x)) < inference.LARGEST
