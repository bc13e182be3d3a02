"""Rows by bands between max pools, against pools of whole maps."""

import copy

import pytest
import torch
from torch import nn

from revseg.layers.bands.corners import pooled_by_bands
from revseg.layers.bands.cut import Bands
from revseg.layers.bands.sources import Unpooled, WithGrids, run_of_source
from revseg.layers.blocks import BNAct
from revseg.layers.corner_pool import pool_with_corners, unpool
from revseg.layers.stack import Stack, layers_of
from tests.helpers import assert_same_result, relative_error, run_step, small_input
from tests.layers.stack_twins import Plain, layer, stirred

SIZES = [(13, 11), (12, 10), (5, 6), (1, 3)]


def rows():
    return stirred(Stack(layer(4, 6), layer(6, 5, dilation=2), nn.Conv2d(5, 4, 3, padding=1)))


class Net(nn.Module):
    """An encoder's stage, and a decoder's; by bands, or of the modules on whole maps."""

    def __init__(self, bands=None):
        super().__init__()
        torch.manual_seed(0)
        self.down, self.up, self.bands = rows(), rows(), bands

    def forward(self, x):
        size = tuple(x.shape[2:])
        if self.bands is None:
            y, corners = pool_with_corners(Plain.forward(_Of(self.down), x))
            return Plain.forward(_Of(self.up), unpool(y, corners, size))
        down, up = (layers_of(stack, without_norm=True) for stack in (self.down, self.up))
        y, corners = pooled_by_bands(down, x, self.bands)
        return run_of_source(up, lambda y: Unpooled(y, corners, size), (y,), self.bands)


class _Of:
    def __init__(self, stack):
        self.stack = stack


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_whole_maps(size, train):
    for images, bands in ((1, Bands(1, 0)), (3, Bands(700)), (2, Bands(2000, 2)), (3, Bands())):
        ours, plain = Net(bands).double().train(train), Net().double().train(train)
        x = small_input(images + (size[0] == 1), 4, *size)
        assert_same_result(run_step(ours, x), run_step(plain, x), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_makes_at_most_twice_the_error_of_plain(dtype):
    x = small_input(2, 4, 23, 24)
    exact = run_step(Net().double(), x)
    ours, plain = (run_step(Net(bands).to(dtype), x.to(dtype)) for bands in (Bands(1500), None))
    found, rounded = (relative_error(each.gradients, exact.gradients) for each in (ours, plain))
    assert found <= 2 * rounded


def test_second_derivatives_and_inference_are_those_of_whole_maps():
    ours, plain = Net(Bands(300)).double(), Net().double()
    x = small_input(1, 4, 7, 6)
    penalties = []
    for net in (ours, plain):
        (dx,) = torch.autograd.grad(net(x).sin().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(dx.square().sum(), [*net.parameters()], allow_unused=True))
    torch.testing.assert_close(*penalties)
    with torch.no_grad():
        found, expected = (copy.deepcopy(net).eval()(x) for net in (ours, plain))
    torch.testing.assert_close(found, expected)


class Grids(nn.Module):
    """Grids beside a map, read by layers."""

    def __init__(self, bands=None):
        super().__init__()
        torch.manual_seed(0)
        self.row, self.bands = stirred(Stack(layer(10, 6), layer(6, 5))), bands
        self.grids = nn.ParameterList(torch.randn(2, 3, k, k) for k in (1, 4))

    def forward(self, x):
        if self.bands is None:
            return Plain.forward(_Of(self.row), WithGrids(x, *self.grids).plain())
        layers = layers_of(self.row, without_norm=True)
        return run_of_source(layers, WithGrids, (x, *self.grids), self.bands)


@pytest.mark.parametrize("size", [(13, 11), (1, 1), (4, 7)], ids=str)
def test_grids_beside_a_map_are_those_of_torch(size):
    for bands in (Bands(1, 0), Bands(1000), Bands()):
        ours, plain = Grids(bands).double(), Grids().double()
        x = small_input(2, 4, *size)
        assert_same_result(run_step(ours, x), run_step(plain, x), 1e-9)


@pytest.mark.parametrize("train", [True, False])
def test_norms_of_joined_maps_are_those_of_torch(train):
    for bands in (Bands(1), Bands(900), Bands()):
        torch.manual_seed(0)
        norm = stirred(BNAct(9)).double().train(train)
        ours = copy.deepcopy(norm)
        ours.bands = bands
        maps = [small_input(3, c, 7, 5, seed=c) for c in (4, 5)]
        found = []
        for each in (ours, norm):
            y = each(*maps)
            found.append((y, torch.autograd.grad(y.sin().sum(), [*maps, *each.parameters()])))
        torch.testing.assert_close(*found)
        torch.testing.assert_close([*ours.buffers()], [*norm.buffers()])
