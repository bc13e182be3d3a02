"""Every network in evaluation is one graph for torch.compile, and runs in ONNX Runtime with its own numbers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import inference
from revseg.models import list_models
from tests.models.test_models_contract import each_model, images, network

SIZE = (64, 96)
EXPORTED = ("cgnet", "enet", "espnet_rev", "icnet", "vnet")  # they hold the operations of all


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
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in EXPORTED else pytest.mark.slow) for name in list_models()],
)
def test_onnx_runtime_gives_its_logits(name):
    model, x = network(name).eval(), images(1, SIZE)
    with torch.no_grad():
        assert inference.difference(inference.onnx(model, x)(x), model(x)) < inference.LARGEST


class Operations(TorchDispatchMode):
    """The names of all operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def test_what_is_always_exported_holds_the_operations_of_all():
    found = {}
    for name in list_models():
        model, x = network(name).eval(), images(1, SIZE)
        with torch.no_grad(), Operations() as seen:
            model(x)
        found[name] = seen.names
    assert set().union(*(found[name] for name in EXPORTED)) == set().union(*found.values())
