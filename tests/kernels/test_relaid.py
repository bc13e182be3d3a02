"""A map in another memory layout has the same values, bit for bit."""

import pytest
import torch

from revseg.kernels.relaid.op import relaid
from tests.kernels.bn_act_cases import ways

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@ways("whole", "compiled")
@pytest.mark.parametrize("size", [(2, 3, 5, 7), (1, 4, 9, 2), (3, 2, 16, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layouts", [LAYOUTS, LAYOUTS[::-1]], ids=str)
def test_values_stay(size, dtype, layouts):
    x = torch.randn(size).to(dtype).contiguous(memory_format=layouts[0])
    y = relaid(x, layouts[1])
    assert y.is_contiguous(memory_format=layouts[1])
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()


@ways("whole", "compiled")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_halves_of_a_joined_map(layout):
    x = torch.randn(2, 8, 5, 6)
    halves = [relaid(half, layout) for half in x.chunk(2, 1)]
    assert all(half.is_contiguous(memory_format=layout) for half in halves)
    y = torch.empty_like(x)
    for half, place in zip(halves, y.chunk(2, 1), strict=True):
        assert relaid(half, torch.contiguous_format, out=place) is place
    assert torch.equal(x, y)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_map_that_lies_so_already_is_returned(layout):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
    assert relaid(x, layout) is x


def test_gradients_pass_through():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    relaid(x, torch.channels_last).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())
