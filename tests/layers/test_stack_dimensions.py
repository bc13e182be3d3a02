"""Stacks of one, two and three dimensions against the modules they are made of."""

import copy

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, OneSidedCoupling, ReversibleSequence, Stack
from revseg.layers import layer_input
from revseg.layers.blocks import ConvBNAct
from revseg.layers.stack import run_layers
from revseg.memory import saved_bytes
from revseg.tensors import CHANNELS_LAST
from revseg.testing import plain_twin
from tests.helpers import assert_same_result, assert_same_step, run_step

SIZES = {1: (11,), 2: (9, 7), 3: (5, 6, 7)}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def norm(dims, channels):
    bn = NORMS[dims](channels)
    nn.init.normal_(bn.weight, 1, 0.3)
    nn.init.normal_(bn.bias, 0, 0.3)
    return bn


KINDS = {
    "same": lambda d: [CONVOLUTIONS[d](8, 8, 3, padding=1, bias=False), norm(d, 8), nn.PReLU(8), CONVOLUTIONS[d](8, 6, 1), norm(d, 6), nn.ReLU()],
    "strided": lambda d: [CONVOLUTIONS[d](8, 6, 3, 2, 1), norm(d, 6), nn.LeakyReLU(0.1)],
    "strided pointwise": lambda d: [CONVOLUTIONS[d](8, 6, 1, 2), norm(d, 6), nn.PReLU()],
    "dilated depthwise": lambda d: [CONVOLUTIONS[d](8, 8, 3, padding=2, dilation=2, groups=8), norm(d, 8), nn.ReLU()],
    "transposed": lambda d: [TRANSPOSED[d](8, 4, 3, 2, 1, output_padding=1), norm(d, 4), nn.ReLU()],
    "without activation": lambda d: [CONVOLUTIONS[d](8, 6, 3), norm(d, 6)],
}  # fmt: skip


@pytest.fixture
def runs(monkeypatch):
    """How many layers each run of a stack had."""
    seen = []

    def counted(layers, x):
        seen.append(len(layers))
        return run_layers(layers, x)

    monkeypatch.setattr("revseg.layers.stack.run_layers", counted)
    return seen


def modules(kind, dims):
    torch.manual_seed(0)
    return KINDS[kind](dims)


def layouts(x):
    yield x
    if x.ndim == 5:
        yield x.contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_modules(kind, dims, train, runs):
    row = modules(kind, dims)
    for x in layouts(torch.randn(2, 8, *SIZES[dims], dtype=torch.float64)):
        stack, plain = (make(*copy.deepcopy(row)).double().train(train) for make in (Stack, nn.Sequential))
        ours, theirs = (run_step(module, x.clone().requires_grad_()) for module in (stack, plain))
        assert_same_result(ours, theirs, 1e-9)
    assert runs
    assert set(runs) == {len(row) // 2 - (len(row) == 6)}


@pytest.mark.parametrize("dims", [2, 3])
def test_a_single_channel_has_the_gradients_of_its_modules(dims):
    """A view of such maps has other strides than they, with which the memory of a gradient did not fit."""
    torch.manual_seed(0)
    conv, last = CONVOLUTIONS[dims](4, 1, 3, padding=1), CONVOLUTIONS[dims](1, 1, 3, padding=1)
    row = [conv, norm(dims, 1), nn.ReLU(), last, norm(dims, 1), nn.PReLU(1)]
    x = torch.randn(2, 4, *SIZES[dims])
    for x in (x, x.contiguous(memory_format=CHANNELS_LAST[x.ndim])):  # noqa: B020
        ours, theirs = (
            run_step(make(*copy.deepcopy(row)), x.requires_grad_()) for make in (Stack, nn.Sequential)
        )
        assert_same_result(ours, theirs, 1e-4)


@pytest.mark.parametrize("passes", ["whole", "blocks"], indirect=True)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gradients_may_replace_raw_maps(dims, passes):
    """In blocks the first pass wrote over volumes that the second read: their plane was not known to be the same memory."""
    row = modules("same", dims)
    for x in layouts(torch.randn(2, 8, *SIZES[dims])):
        stack, plain = (make(*copy.deepcopy(row)) for make in (Stack, nn.Sequential))
        ours, theirs = (run_step(module, x.clone().requires_grad_()) for module in (stack, plain))
        assert_same_result(ours, theirs, 1e-4)


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_maps_go_image_by_image(dims, dtype, monkeypatch):
    row = modules("same", dims)
    x = torch.randn(3, 8, *SIZES[dims]).to(dtype)
    stack = Stack(*row).to(dtype)
    expected = run_step(copy.deepcopy(stack), x.clone().requires_grad_())
    monkeypatch.setattr(layer_input, "_LARGE", 1)
    ours = run_step(stack, x.clone().requires_grad_())
    assert_same_result(ours, expected, 1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("coupling", [AdditiveCoupling, OneSidedCoupling])
@pytest.mark.parametrize("dims", [1, 3])
def test_as_the_function_of_a_coupling(coupling, dims):
    def f():
        return Stack(CONVOLUTIONS[dims](4, 4, 3, padding=1), norm(dims, 4), nn.PReLU(4))

    functions = (f(), f()) if coupling is AdditiveCoupling else (f(),)
    sequence = ReversibleSequence(coupling(*functions)).double()
    assert_same_step(sequence, plain_twin(sequence), torch.randn(2, 8, *SIZES[dims], dtype=torch.float64))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_it_keeps_one_map_a_layer(dims):
    layers = [
        m for _ in range(3) for m in (CONVOLUTIONS[dims](8, 8, 3, padding=1), norm(dims, 8), nn.PReLU(8))
    ]
    x = torch.randn(2, 8, *(4 * n for n in SIZES[dims]))
    plain, ours = nn.Sequential(*layers), Stack(*layers)
    assert saved_bytes(lambda: plain(x)) > 8.5 * x.nbytes
    assert saved_bytes(lambda: ours(x)) < 4.1 * x.nbytes  # the output, too


def test_second_derivatives_of_volumes():
    stack = Stack(nn.Conv3d(2, 2, 3, padding=1), norm(3, 2), nn.PReLU(2)).double()
    x = torch.randn(2, 2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(stack, x, fast_mode=True)


MIXED = {
    "unbatched": (lambda: [nn.Conv2d(8, 8, 1), nn.Identity()], (8, 5, 5)),
    "norm of other dimensions": (lambda: [nn.Conv2d(8, 8, 1), nn.BatchNorm1d(8), nn.ReLU()], (2, 8, 5, 5)),
    "input of other dimensions": (lambda: [nn.Conv3d(8, 8, 1), nn.BatchNorm3d(8), nn.ReLU()], (2, 8, 5, 5)),
    "a layer of two": (lambda: [ConvBNAct(8, 8)], (2, 8, 5)),
    "then vectors": (
        lambda: [nn.Conv3d(8, 8, 1), nn.BatchNorm3d(8), nn.ReLU(), nn.Flatten(2), nn.Conv1d(8, 4, 1), nn.BatchNorm1d(4)],
        (2, 8, 3, 3, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXED)
def test_dimensions_that_do_not_fit_are_left_to_the_modules(kind):
    make, shape = MIXED[kind]
    row, x = make(), torch.randn(shape)
    results = []
    for module in (nn.Sequential(*copy.deepcopy(row)), Stack(*copy.deepcopy(row))):
        try:
            results.append(module(x))
        except (RuntimeError, ValueError) as error:
            results.append(str(error))
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        torch.testing.assert_close(*results)
