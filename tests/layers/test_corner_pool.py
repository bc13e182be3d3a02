import pytest
import torch
import torch.nn.functional as F

from revseg.layers.corner_pool import pool_with_corners, unpool

SIZES = [(6, 8), (7, 9), (1, 1), (1, 5), (5, 2)]


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pools_are_those_of_torch_with_their_gradients(size, is_open, monkeypatch):
    monkeypatch.setattr("revseg.layers.corner_pool.is_size_open", lambda x: is_open)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    maxima, corners = pool_with_corners(x)
    expected, index = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
    assert torch.equal(maxima, expected)
    assert corners.dtype == torch.uint8
    again = unpool(maxima, corners, size)
    plain = F.max_unpool2d(expected, index, 2, output_size=size)
    assert torch.equal(again, plain)
    weight = torch.randn_like(plain)
    found, wanted = (torch.autograd.grad(y, x, weight)[0] for y in (again, plain))
    assert torch.equal(found, wanted)


def test_of_equal_values_the_first_is_the_largest(monkeypatch):
    x = torch.tensor([[1.0, 2.0, 2.0], [2.0, 2.0, 2.0], [0.0, 0.0, 3.0]])[None, None]
    for is_open in (False, True):
        monkeypatch.setattr("revseg.layers.corner_pool.is_size_open", lambda x, is_open=is_open: is_open)
        maxima, corners = pool_with_corners(x)
        assert maxima.flatten().tolist() == [2, 2, 0, 3]
        assert corners.flatten().tolist() == [1, 0, 0, 0]
