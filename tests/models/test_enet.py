import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg.layers.corner_pool import pool_with_corners
from revseg.models.enet import Bottleneck, Doubling, ENet, Halving
from tests.helpers import run_step, small_input
from tests.layers.stack_twins import stirred


def test_dropout_is_that_of_the_official_code():
    rates = [module.p for module in ENet().modules() if isinstance(module, nn.Dropout2d)]
    assert rates == [0.01] * 5 + [0.1] * 17


def test_kinds_at_an_eighth_are_those_of_the_table():
    middles = []
    for unit in ENet(memory="fastest").stage2:
        convs = [m for m in unit.bottleneck if isinstance(m, nn.Conv2d)][1:-1]
        middles.append([(conv.kernel_size, conv.dilation[0], conv.bias is not None) for conv in convs])
    asymmetric = [((1, 5), 1, False), ((5, 1), 1, True)]
    regular = {d: [((3, 3), d, True)] for d in (1, 2, 4, 8, 16)}
    assert (
        middles
        == [regular[1], regular[2], asymmetric, regular[4], regular[1], regular[8], asymmetric, regular[16]]
        * 2
    )


def norm(x, bn):
    return F.batch_norm(x, None, None, bn.weight, bn.bias, True, eps=1e-3)


def by_hand(row, x):
    """A bottleneck of seven layers and a regular middle, in training."""
    narrow, bn1, act1, middle, bn2, act2, wide, bn3 = row
    y = act1(norm(F.conv2d(x, narrow.weight, stride=narrow.stride), bn1))
    if isinstance(middle, nn.ConvTranspose2d):
        y = F.conv_transpose2d(y, middle.weight, middle.bias, 2, 1, 1)
    else:
        d = middle.dilation
        y = F.conv2d(y, middle.weight, middle.bias, padding=d, dilation=d)
    return norm(F.conv2d(act2(norm(y, bn2)), wide.weight), bn3)


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("activation", ["prelu", "relu"])
def test_a_unit_by_hand(kind, activation):
    unit = stirred(Bottleneck(8, kind, 0.0, activation)).double()
    x = small_input(2, 8, 9, 7)
    torch.testing.assert_close(unit(x), unit.act(x + by_hand(unit.bottleneck, x)))


@pytest.mark.parametrize("size", [(8, 6), (9, 7)])
def test_halving_by_hand(size):
    block = stirred(Halving(8, 12, 0.0)).double()
    x = small_input(2, 8, *size)
    even = F.pad(x, (0, size[1] % 2, 0, size[0] % 2))
    expected = by_hand(block.bottleneck, even)
    pooled = F.max_pool2d(x, 2, ceil_mode=True)
    y, corners = block(x)
    torch.testing.assert_close(y, block.act(torch.cat((expected[:, :8] + pooled, expected[:, 8:]), 1)))
    assert corners.shape == pooled.shape


@pytest.mark.parametrize("size", [(8, 6), (9, 7)])
def test_doubling_by_hand(size):
    block = stirred(Doubling(12, 8)).double()
    pooled, indices = F.max_pool2d(small_input(2, 8, *size), 2, ceil_mode=True, return_indices=True)
    _, corners = pool_with_corners(small_input(2, 8, *size))
    x = small_input(2, 12, *pooled.shape[-2:], seed=1)
    main = norm(F.conv2d(x, block.narrow[0].weight), block.narrow[1])
    expected = F.max_unpool2d(main, indices, 2, output_size=size)
    expected = F.relu(expected + by_hand(block.bottleneck, x)[..., : size[0], : size[1]])
    torch.testing.assert_close(block(x, corners, size), expected)


def test_dropout_masks_repeat_in_the_second_run():
    x = torch.randint(0, 256, (2, 3, 33, 49), dtype=torch.uint8)
    results = []
    for memory in ("lowest", "fastest"):
        torch.manual_seed(0)
        model = ENet(3, widths=(4, 8, 16), depth=1, repeats=1, dropout=(0.5, 0.5), memory=memory).double()
        results.append([g for g in run_step(model, x).gradients.values() if g is not None])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (16, 64)}, "three rising widths, multiples of 4, got"),
        ({"widths": (16, 66, 128)}, "three rising widths, multiples of 4, got"),
        ({"depth": 0}, "depth and repeats of at least 1, got 0 and 2"),
        ({"repeats": 0}, "depth and repeats of at least 1, got 4 and 0"),
        ({"dropout": (0.1,)}, "two probabilities of dropout"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ENet(**options)
