"""Memory that maps by bands share or do without: the same bits as in memory of their own."""

import pytest
import torch
from torch import nn

from revseg.layers.bands.cut import BandPlan, Bands
from revseg.layers.bands.module import ByBands
from revseg.layers.recompute import Recompute
from revseg.models.vnet_cpp import CPP


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def pyramid(**options):
    torch.manual_seed(0)
    return ByBands(CPP(16, 64), Bands(1 << 12), streams=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("height", [64, 63])
def test_the_gradient_of_the_input_lies_where_that_of_the_output_did(height, dtype, monkeypatch):
    """Where it has as many bytes a row; what was given is left alone."""
    fits, used = BandPlan.lies_over, []

    def results(shared):
        monkeypatch.setattr(
            BandPlan, "lies_over", lambda *args: shared and (used.append(fits(*args)) or used[-1])
        )
        row = pyramid().to(dtype)
        xs = [channels_last(3, 8, height, 64, dtype=dtype).requires_grad_() for _ in range(2)]
        ys = row(xs)
        dys = [channels_last(*y.shape, dtype=dtype) for y in ys]
        before = [dy.clone() for dy in dys]
        found = torch.autograd.grad(ys, [*xs, *row.parameters()], dys)
        assert all(map(torch.equal, dys, before))
        assert all(dx._base is None for dx in found)
        return [*ys, *found]

    assert all(map(torch.equal, results(True), results(False)))
    assert used == [height == 64]


class Watched(nn.Module):
    """A row, and the strides of what it gives."""

    def __init__(self, row):
        super().__init__()
        self.row, self.strides = row, []

    def forward(self, x):
        ys = self.row(x.chunk(2, 1))
        self.strides.append({y.stride() for y in ys})
        return ys


def test_an_end_that_nobody_reads_is_not_made_in_the_second_run():
    def results(ends):
        watched = Watched(pyramid(ends=ends))
        torch.manual_seed(1)
        x = channels_last(2, 16, 32, 32).requires_grad_()
        ys = Recompute(watched, check=None)(x)
        found = torch.autograd.grad(ys, [x, *watched.parameters()], [channels_last(*y.shape) for y in ys])
        buffers = [b.clone() for b in watched.buffers()]
        return [*ys, *found, *buffers], watched.strides

    (ours, strides), (expected, others) = results(True), results(False)
    assert all(map(torch.equal, ours, expected))
    assert strides[1] == {(0, 0, 0, 0)}
    assert strides[0] == others[0] == others[1]
