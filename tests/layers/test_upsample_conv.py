"""The last convolution of a network, by bands of rows, against that of PyTorch."""

import pytest
import torch
from torch import nn

from revseg.layers import upsample_conv as doubling
from revseg.layers.upsample_conv import DoublingConv2d
from revseg.memory import peak_bytes
from tests.helpers import assert_same_step, default_loss, gradient_error, run_step, small_input

layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)


@pytest.fixture(params=[1, 3, 7], ids=lambda rows: f"{rows} rows")
def bands(request, monkeypatch):
    """Bands of so many rows of a map [2, 5, 7, 9]; the last is not always full."""
    monkeypatch.setattr(doubling, "BAND", request.param * 4 * 2 * 3 * 9)
    return request.param


def twins(bias=True, dtype=torch.float64):
    ours, plain = DoublingConv2d(5, 3, bias=bias), nn.ConvTranspose2d(5, 3, 2, stride=2, bias=bias)
    plain.load_state_dict(ours.state_dict())
    return ours.to(dtype), plain.to(dtype)


def some_map(layout=torch.contiguous_format, **options):
    x = small_input(2, 5, 7, 9, **options)
    return x.detach().contiguous(memory_format=layout).requires_grad_(x.requires_grad)


@layouts
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("bands")
def test_is_the_convolution_of_pytorch(layout, bias):
    ours, plain = twins(bias)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert_same_step(ours, plain, some_map(layout))
    assert ours(some_map(layout)).stride() == plain(some_map(layout)).stride()


@pytest.mark.usefixtures("bands")
def test_frozen_weights_and_inputs_get_no_gradient():
    ours, plain = twins()
    for net in (ours, plain):
        net.weight.requires_grad_(False)
    assert_same_step(ours, plain, some_map())
    assert_same_step(ours, plain, some_map(requires_grad=False))
    with torch.no_grad():
        torch.testing.assert_close(ours(some_map()), plain(some_map()))


@pytest.mark.usefixtures("bands")
def test_gradients_of_the_gradient():
    found = []
    for net in twins():
        x = some_map()
        first = torch.autograd.grad(default_loss(net(x)), [x, *net.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *net.parameters()])
        found.append(dict(enumerate(second)))
    assert gradient_error(*found) < 1e-9


@pytest.mark.parametrize("how", ["autocast", "half"])
@pytest.mark.usefixtures("bands")
def test_half_precision(how):
    dtype = torch.bfloat16 if how == "half" else torch.float32
    ours, plain = twins(dtype=dtype)
    exact = run_step(twins()[1].requires_grad_(), some_map()).gradients.keys()
    results = []
    for net in (ours, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            result = run_step(net, some_map(dtype=dtype))
        assert result.outputs[0].dtype == torch.bfloat16
        assert result.gradients.keys() == exact
        results.append(result)
    torch.testing.assert_close(results[0].outputs, results[1].outputs)
    assert gradient_error(results[0].gradients, results[1].gradients) < 2e-2


def test_only_large_maps_go_by_bands(monkeypatch):
    monkeypatch.setattr(doubling, "_ByBands", None)
    ours, plain = twins()
    assert_same_step(ours, plain, some_map())


@pytest.mark.usefixtures("bands")
def test_not_where_kernels_are_off_or_a_tracer_watches(monkeypatch):
    ours, plain = twins(dtype=torch.float32)
    x = some_map(dtype=torch.float32, requires_grad=False)
    expected = plain(x)
    monkeypatch.setattr(doubling, "_ByBands", None)
    torch.testing.assert_close(torch.jit.trace(ours, x, check_trace=False)(x), expected)
    monkeypatch.setenv("REVSEG_KERNELS", "0")
    torch.testing.assert_close(ours(x), expected)


def test_copies_are_those_of_a_band():
    ours, plain = twins(dtype=torch.float32)
    x = torch.randn(1, 5, 512, 512).requires_grad_()
    y = 3 * 1024 * 1024 * 4
    assert peak_bytes(lambda: ours(x).backward(torch.ones(1, 3, 1024, 1024))) < 3 * y
    assert peak_bytes(lambda: plain(x).backward(torch.ones(1, 3, 1024, 1024))) > 3.6 * y
