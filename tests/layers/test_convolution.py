"""Gradients of convolutions by bands of rows, where a CPU would copy whole maps of half precision."""

import pytest
import torch
from torch import nn

from revseg.layers import convolution, layer_input
from revseg.layers.convolution import Convolution
from revseg.layers.layer_input import LayerInput
from revseg.memory import peak_bytes

CONVOLUTIONS = {
    "3 x 3": {"kernel_size": 3, "padding": 1, "bias": False},
    "with bias": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "strided, 7 x 7": {"kernel_size": 7, "padding": 3, "stride": 2},
    "strided, 1 x 1": {"kernel_size": 1, "stride": 2, "bias": False},
    "1 x 1": {"kernel_size": 1},
    "dilated": {"kernel_size": 3, "padding": 4, "dilation": 4},
    "down": {"kernel_size": (3, 1), "padding": (2, 0), "dilation": (2, 1), "bias": False},
    "across": {"kernel_size": (1, 3), "padding": (0, 2), "dilation": (1, 2), "bias": False},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "without padding": {"kernel_size": 3},
    "more padding than rows": {"kernel_size": 3, "padding": 12, "dilation": 12},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_bands_add_up_to_the_gradient(options, layout, dtype, monkeypatch):
    monkeypatch.setattr(layer_input, "_LARGE", 1)
    monkeypatch.setattr(convolution, "_BAND", 4 * 13 * 3)  # three rows of the map below
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, **options)
    x = torch.randn(2, 4, 11, 13).to(dtype).contiguous(memory_format=layout)
    parameters = [p.detach().to(dtype) for p in conv.parameters()]
    op = Convolution.of(conv)
    du = torch.randn_like(op.forward(x.float(), *(p.float() for p in parameters))).to(dtype)

    wanted = [False, *(True for _ in parameters)]
    dx, *found = op.backward(du, LayerInput(x), parameters, wanted)
    exact = [p.double().requires_grad_() for p in parameters]
    expected = torch.autograd.grad(op.forward(x.double(), *exact), exact, du.double())
    assert dx is None
    for ours, true in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        rounding = (true.to(dtype).double() - true).norm()
        assert (ours.double() - true).norm() <= 1.01 * rounding  # rounded once, at the end


def test_parameters_that_are_not_wanted_get_none(monkeypatch):
    monkeypatch.setattr(layer_input, "_LARGE", 1)
    conv = nn.Conv2d(4, 8, 3, padding=1).bfloat16()
    x, du = torch.randn(1, 4, 9, 9).bfloat16(), torch.randn(1, 8, 9, 9).bfloat16()
    dx, dweight, dbias = Convolution.of(conv).backward(
        du, LayerInput(x), [p.detach() for p in conv.parameters()], [True, False, True]
    )
    assert dweight is None
    assert (dx.shape, dbias.shape) == (x.shape, (8,))


def test_a_weight_gradient_in_half_precision_takes_no_copies_of_the_maps():
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False).bfloat16()
    x = torch.randn(1, 8, 256, 1024).bfloat16().contiguous(memory_format=torch.channels_last)
    du, op = torch.randn_like(x), Convolution.of(conv)

    def step():
        op.backward(du, LayerInput(x), [conv.weight.detach()], [False, True])

    assert peak_bytes(step) < 12 * 2**20  # a band of each in float32; 24 MiB as a whole


@pytest.mark.parametrize("stride", [2, (1, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_strided_pointwise_convolution_of_few_channels(layout, stride):
    """Whose weight gradient in channels_last corrupts memory where PyTorch takes it."""
    conv = nn.Conv2d(8, 16, 1, stride=stride).double()
    x = torch.randn(2, 8, 9, 14).double().contiguous(memory_format=layout).requires_grad_()
    op, y = Convolution.of(conv), conv(x.contiguous())
    assert op.every == conv.stride
    du = torch.randn_like(y)
    parameters = list(conv.parameters())
    torch.testing.assert_close(op.forward(x, *parameters), y)
    found = op.backward(du, LayerInput(x.detach()), [p.detach() for p in parameters], [True] * 3)
    torch.testing.assert_close(tuple(found), torch.autograd.grad(y, [x, *parameters], du))
