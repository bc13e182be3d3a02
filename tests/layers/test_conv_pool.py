"""`ConvPool` against its modules: outputs, every gradient, running statistics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg.layers.conv_pool import ConvPool, ImageConvPool
from revseg.layers.images import normalize_images
from revseg.layers.stack import Stack
from tests.helpers import assert_same_result, run_step, small_input
from tests.layers.stack_twins import stirred


class Plain(nn.Module):
    """Its definition."""

    def __init__(self, block, images=False):
        super().__init__()
        self.conv, self.norm = copy.deepcopy(block.conv), copy.deepcopy(block.norm)
        self.images = images

    def forward(self, x):
        if self.images:
            x = normalize_images(x).to(self.conv.weight.dtype)
        square = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), value=-torch.inf)
        pooled = F.max_pool2d(square, 2)
        y = torch.cat((F.conv2d(x, self.conv.weight, self.conv.bias, 2, 1), pooled), 1)
        return self.norm[1](self.norm[0](y))


def assert_same(block, x, images=False):
    """One step of the block and of its definition."""
    plain = Plain(block, images)
    assert_same_result(run_step(block, x), run_step(plain, x))


@pytest.mark.parametrize("size", [(8, 6), (9, 6), (7, 11), (1, 2)])
@pytest.mark.parametrize("activation", ["relu", "prelu"])
def test_step_is_that_of_its_modules(size, activation, runs):
    block = stirred(ConvPool(4, 9, activation=activation)).double()
    assert_same(block, small_input(3, 4, *size))
    assert runs == [1]


def test_plain_path_is_the_same(monkeypatch):
    monkeypatch.setenv("REVSEG_KERNELS", "0")
    block = stirred(ImageConvPool(3, 9)).double()
    x = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8)
    assert_same(block, x, images=True)


@pytest.mark.parametrize("bytes_", [True, False])
def test_images_are_normalized_on_the_way(bytes_, runs):
    block = stirred(ImageConvPool(3, 9)).double()
    x = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8) if bytes_ else small_input(2, 3, 9, 7)
    assert_same(block, x, images=True)
    assert runs == [1]


def test_frozen_parts_get_no_gradient():
    block = stirred(ConvPool(4, 9)).double()
    block.conv.weight.requires_grad_(False)
    x = small_input(2, 4, 7, 5)
    assert_same(block, x)
    x = x.detach()
    assert_same(block, x)


def test_a_row_of_them_is_one_stack():
    row = stirred(Stack(ImageConvPool(3, 6), ConvPool(6, 9), ConvPool(9, 12, activation="prelu"))).double()
    plain = nn.Sequential(*(Plain(block, images=i == 0) for i, block in enumerate(row)))
    x = torch.randint(0, 256, (2, 3, 19, 13), dtype=torch.uint8)
    assert_same_result(run_step(row, x), run_step(plain, x))


def test_too_few_channels_are_refused():
    with pytest.raises(ValueError, match="expected more than 4 channels after ConvPool, got 4"):
        ConvPool(4, 4)
