"""On devices without float64, as those of Apple and some of Intel, everything works that does not ask for it by name."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from revseg import (
    AdditiveCoupling,
    AffineCoupling,
    HaarDownsample,
    OneSidedCoupling,
    Recompute,
    ReversibleSequence,
    Squeeze,
    Stack,
    ops,
)
from revseg.engine import drift
from revseg.kernels import precision
from revseg.kernels.precision import widest
from revseg.losses import OhemCrossEntropy, UpsampleCrossEntropy, predict_labels
from revseg.metrics import ConfusionMatrix
from revseg.models import create_model
from revseg.testing import Outcome, check, distances, inversion_bound, training_step
from tests.device_without_float64 import DEVICE, Device, Driver, There
from tests.helpers import small_block

CPU, F32, F64 = torch.device("cpu"), torch.float32, torch.float64


@pytest.fixture
def device(monkeypatch):
    """The device, there during the test."""
    monkeypatch.setattr(torch, DEVICE.type, Driver, raising=False)
    monkeypatch.setattr(drift, "_disable_current_modes", nullcontext)  # a real device stays when modes go
    precision._found.cache_clear()
    drift._places.cache_clear()
    with Device():
        yield DEVICE
    precision._found.cache_clear()
    drift._places.cache_clear()


def moved(value, device):
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, value)


def tensors(value):
    return [x for x in tree_leaves(value) if isinstance(x, torch.Tensor)]


def test_the_device_refuses_float64_and_other_devices(device):
    x = torch.ones(3, device=device)
    assert x.device == device
    for make in (
        lambda: x.double(),
        lambda: torch.ones(3, dtype=F64, device=device),
        lambda: x.sum(dtype=F64),
    ):
        with pytest.raises(TypeError, match="no float64"):
            make()
    with pytest.raises(RuntimeError, match="one device"):
        x + torch.ones(3)
    assert x.cpu().double().dtype == F64


def test_the_widest_dtype_is_found_out(device):
    assert widest(device) == F32
    assert widest(torch.device("mps")) == F32
    assert widest(CPU) == widest(torch.device("meta")) == widest(torch.device("cuda")) == F64


def test_a_device_that_has_float64_is_found_out(monkeypatch):
    monkeypatch.setattr(precision, "_KNOWN", {})
    assert precision._found.__wrapped__(CPU) == F64


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ops.KERNELS)
def test_operations(device, name, dtype):
    comparisons = ops.compare(ops.KERNELS[name], device, dtype)
    assert comparisons
    assert [each for each in comparisons if not each.is_right] == []


def stack(*options):
    layers = nn.Conv2d(6, 8, (3, 1), padding=(1, 0), bias=False), nn.BatchNorm2d(8), nn.PReLU(8)
    return Stack(*layers, nn.Conv2d(8, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), *options)


NETWORKS = {
    "stack": (stack, (2, 6, 9, 7)),
    "stack of volumes": (lambda: Stack(nn.Conv3d(4, 4, 3), nn.BatchNorm3d(4), nn.ReLU()), (2, 4, 5, 4, 5)),
    "recompute": (lambda: Recompute(stack(nn.Dropout(0.5))), (2, 6, 9, 7)),
    "sequence": (lambda: ReversibleSequence(small_block(), small_block(OneSidedCoupling)), (2, 8, 6, 5)),
    "affine": (lambda: ReversibleSequence(small_block(AffineCoupling)), (2, 8, 6, 5)),
    "per_block": (lambda: ReversibleSequence(small_block(), small_block(), per_block=True), (2, 8, 6, 5)),
    "exact": (lambda: ReversibleSequence(small_block(), small_block(), exact=True), (2, 8, 6, 5)),
    "lossless": (lambda: ReversibleSequence(small_block(), exact="lossless"), (2, 8, 6, 5)),
    "downsampling": (lambda: ReversibleSequence(Squeeze(), HaarDownsample()), (2, 4, 8, 4)),
    "stacks in a sequence": (
        lambda: ReversibleSequence(
            OneSidedCoupling(Stack(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()))
        ),
        (2, 8, 6, 5),
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_the_step_of_the_cpu(device, name, training):
    make, shape = NETWORKS[name]
    here = make().train(training)
    there, x = copy.deepcopy(here).to(device), torch.randn(shape)
    expected, found = training_step(here, x), training_step(there, x.to(device))
    assert all(isinstance(y, There) for y in (*found.outputs, *tensors(found.gradients)))
    ours = Outcome(*moved((found.outputs, found.gradients, found.buffers), CPU))
    assert all(off < 1e-5 for off in distances(ours, expected).values())


@pytest.mark.parametrize("loss", [UpsampleCrossEntropy, OhemCrossEntropy])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "reduction": "sum"}, {"weight": True}], ids=str
)
def test_losses_metrics_and_labels(device, loss, options):
    options = {**options, "weight": torch.rand(5)} if "weight" in options else options
    logits, labels = torch.randn(2, 5, 6, 4), torch.randint(0, 5, (2, 24, 17))
    labels[:, :3] = 255
    results = []
    for where in (CPU, device):
        x, y = logits.detach().clone().to(where).requires_grad_(), labels.to(where)
        counts = torch.zeros(5, 5, dtype=torch.int64, device=where)
        value = loss(**options).to(where)(x, y, counts)
        value.backward()
        matrix = ConfusionMatrix(5)
        matrix.update(predict_labels(x.detach(), (24, 17)), y)
        results.append(
            [moved(t, CPU) for t in (value.detach(), x.grad, counts, matrix.counts(), matrix.iou())]
        )
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("memory", ["fastest", "lowest"])
def test_vnet_trains(device, memory):
    net = create_model("vnet", 5, memory=memory, widths=(8, 16, 32)).to(device)
    labels = torch.randint(0, 5, (2, 32, 32), device=device)
    UpsampleCrossEntropy()(net(torch.randn(2, 3, 32, 32, device=device)), labels).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize("coupling", [AdditiveCoupling, OneSidedCoupling, AffineCoupling])
def test_contracts_are_checked(device, coupling):
    block, x = small_block(coupling).to(device), torch.randn(2, 8, 6, 5, device=device)
    check(block, x)
    sequence = ReversibleSequence(block)
    torch.testing.assert_close(inversion_bound(sequence, x), inversion_bound(sequence.cpu(), x.cpu()))
