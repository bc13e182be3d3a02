"""SegNet: the counts of the official layers, and the pools that the decoder undoes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg.memory import saved_bytes
from revseg.models.segnet import SegNet
from tests.helpers import assert_same_result, run_step
from tests.models.networks import (
    count_of,
    gflops,
    images,
    made,
    step,
)

SMALL = {"num_classes": 5, "widths": (4, 5, 6, 7, 8)}


class Plain(nn.Module):
    """The network with PyTorch's own pools and indices, its modules in the order of SegNet's."""

    def __init__(self, classes, widths):
        super().__init__()
        down, up = [], []
        for i, (width, count) in enumerate(zip(widths, (2, 2, 3, 3, 3), strict=True)):
            before = widths[i - 1] if i else 3
            inner = [(width, width)] * (count - 1)
            down.append(nn.Sequential(*(self.layer(*c) for c in [(before, width), *inner])))
            last = self.layer(width, before) if i else nn.Conv2d(width, classes, 3, padding=1)
            up.append(nn.Sequential(*(self.layer(*c) for c in inner), last))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up[::-1])

    @staticmethod
    def layer(before, width):
        return nn.Sequential(nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x):
        pools = []
        for stage in self.down:
            x = stage(x)
            size = x.shape[2:]
            x, index = F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
            pools.append((index, size))
        for stage in self.up:
            index, size = pools.pop()
            x = stage(F.max_unpool2d(x, index, 2, output_size=size))
        return x


@pytest.mark.parametrize(("classes", "parameters"), [(19, 29_453_971), (11, 29_449_355)])
def test_parameter_counts(classes, parameters):
    assert count_of(SegNet, num_classes=classes) == parameters


def test_operations_of_a_full_image_of_eleven_classes():
    """Those of 19 stand in the contract of all networks."""
    assert round(gflops(SegNet, num_classes=11) / 2, 2) == 1292.52


@pytest.mark.parametrize("size", [(33, 49), (32, 64)], ids=str)
def test_step_is_that_of_plain_pools_with_indices(size):
    net, plain = made(SegNet, **SMALL).double(), Plain(5, SMALL["widths"]).double()
    plain.load_state_dict(dict(zip(plain.state_dict(), net.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    ours, theirs = step(net, x), run_step(plain, x)
    for values in (theirs.gradients, theirs.buffers):
        names = ours.gradients if values is theirs.gradients else ours.buffers
        renamed = dict(zip(names, values.values(), strict=True))
        values.clear()
        values |= renamed
    assert_same_result(ours, theirs, 1e-9)


def test_places_of_maxima_take_a_byte():
    """Between encoder and decoder the lowest level keeps images, the last map and places."""
    net, x = SegNet(**SMALL, memory="lowest"), images(64, 64)
    values = sum(c * (32 >> i) ** 2 for i, c in enumerate(SMALL["widths"]))  # of one image
    last = 4 * SMALL["widths"][-1] * 2 * 2
    assert saved_bytes(lambda: net(x)) == 2 * (values + last) + x.nbytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (64, 128)}, r"five positive widths, got \(64, 128\)"),
        ({"widths": (0, 1, 1, 1, 1)}, "five positive widths"),
    ],
)
def test_wrong_hyperparameters_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SegNet(**options)
