import pytest
import torch
import torch.nn.functional as F

from revseg.layers.grid_pool import GridMeans


@pytest.mark.parametrize("cells", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(6, 12), (7, 9), (1, 1), (2, 5)], ids=str)
def test_means_are_those_of_torch_with_their_gradient(cells, size, monkeypatch):
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    expected = F.adaptive_avg_pool2d(x, cells)
    pool, weight = GridMeans(cells), torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, x, weight)[0]
    assert torch.equal(pool(x), expected)
    monkeypatch.setattr("revseg.layers.grid_pool.is_size_open", lambda x: True)
    torch.testing.assert_close(pool(x), expected)
    torch.testing.assert_close(torch.autograd.grad(pool(x), x, weight)[0], wanted)
