"""Rows by bands with activations that the passes do not know."""

import copy

import pytest
import torch
from torch import nn

from revseg.layers.norms import _ELEMENTWISE
from revseg.memory.apply import Part, apply_parts
from revseg.memory.row_by_bands import layers_of_row

IN_PLACE = [nn.ReLU6, nn.Hardtanh, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.ELU, nn.CELU, nn.SELU]


def inverted_residual(act):
    """Of MobileNetV2: 1 x 1, depthwise with a stride, 1 x 1; a convolution without norm behind."""
    return nn.Sequential(
        *(nn.Conv2d(4, 24, 1, bias=False), nn.BatchNorm2d(24), act()),
        *(nn.Conv2d(24, 24, 3, 2, 1, groups=24, bias=False), nn.BatchNorm2d(24), act()),
        *(nn.Conv2d(24, 6, 1, bias=False), nn.BatchNorm2d(6)),
        *(nn.Conv2d(6, 5, 3, padding=1), act()),
    )


def trained(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("act", _ELEMENTWISE)
def test_a_row_by_bands_is_the_row(act):
    """In float64, as sums over bands are in another order; the images large enough for many bands."""
    torch.manual_seed(0)
    model = nn.Sequential(inverted_residual(act)).double()
    fitted = apply_parts(copy.deepcopy(model), [Part("0", 0, 10, by_bands=True)])
    assert len(layers_of_row(model[0], torch.empty(1, 4, 8, 8))) == 4
    x = 3 * torch.randn(2, 4, 130, 41, dtype=torch.float64)
    for ours, plain in zip(trained(fitted, x), trained(model, x), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9 * plain.abs().max().item())


@pytest.mark.parametrize("act", IN_PLACE)
def test_in_place(act):
    torch.manual_seed(0)
    model = (
        nn.Sequential(inverted_residual(lambda: act(inplace=True)))
        .double()
        .to(memory_format=torch.channels_last)
    )
    fitted = apply_parts(copy.deepcopy(model), [Part("0", 0, 10, by_bands=True)])
    x = (3 * torch.randn(2, 4, 64, 41, dtype=torch.float64)).contiguous(memory_format=torch.channels_last)
    for ours, plain in zip(trained(fitted, x), trained(model, x), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9 * plain.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_as_near_as_plain(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(inverted_residual(nn.SiLU))
    x = torch.randn(2, 4, 96, 64)
    exact = trained(copy.deepcopy(model).double(), x.double())
    fitted = apply_parts(copy.deepcopy(model), [Part("0", 0, 10, by_bands=True)])
    with torch.autocast("cpu", dtype):
        found = [trained(network, x) for network in (fitted, model)]
    for ours, plain, true in zip(*found, exact, strict=True):
        off = [(each.double() - true).norm() for each in (ours, plain)]
        assert off[0] <= 2 * off[1] + 1e-6 * true.double().norm()
