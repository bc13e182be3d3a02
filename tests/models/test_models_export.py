"""Every network exports for any batch and any size, odd ones too, and gives its logits there; in ONNX Runtime as well."""

import logging
import warnings
from importlib.util import find_spec

import pytest
import torch

from revseg.layers.images import normalize_images
from revseg.models import list_models
from tests.models.test_models_contract import images, network

OTHERS = [(3, (33, 49)), (1, (65, 130)), (1, (96, 64))]
# Compiling takes its time: of all networks one that unpools, by default; the parts have tests of their own.
NAMES = [pytest.param(name, marks=[] if name == "enet" else pytest.mark.slow) for name in list_models()]


def exported(name):
    """The network, and its graph from an example of one size."""
    model, example = network(name).eval(), normalize_images(images(2, (64, 96)))
    size = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        return model, torch.export.export(model, (example,), dynamic_shapes={"images": size})


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_holds_for_any_size(name):
    model, graph = exported(name)
    run = graph.module()
    for n, size in OTHERS:
        x = normalize_images(images(n, size))
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="needs the extra export"
)
@pytest.mark.parametrize("name", list_models())
def test_onnx_runtime_gives_the_logits_of_any_size(name, tmp_path):
    import onnxruntime

    model, graph = exported(name)
    path = tmp_path / "network.onnx"
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(graph, (), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n, size in OTHERS:
        x = normalize_images(images(n, size))
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(found, model(x), rtol=1e-3, atol=1e-4)
