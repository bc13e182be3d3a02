"""Rows of layers by bands, for signals and volumes: a row of a volume is a slice, of a signal a position."""

import copy

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, ReversibleSequence, Stack
from revseg.layers.bands.cut import Bands
from revseg.layers.bands.head import HeadByBands
from revseg.layers.bands.module import ByBands
from revseg.layers.bands.rows import Band, Whole
from revseg.layers.convolution import Convolution
from revseg.layers.recompute import Recompute
from revseg.tensors import is_channels_last
from revseg.testing import plain_twin
from tests.helpers import assert_same_result, small_input
from tests.layers.bands_checks import (
    assert_autocast_of_plain,
    assert_equals_whole_maps,
    assert_second_derivative_and_frozen_parts,
    assert_twice_plain_at_most,
)
from tests.layers.stack_twins import Plain, stirred
from tests.layers.test_bands import banded, step  # noqa: F401, a fixture

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
SIZE = {1: (29,), 2: (9, 8), 3: (9, 5, 6)}


def first(d, numbers):
    """Of three numbers, those of so many dimensions."""
    return numbers[:d]


def block(d, *channels, act=None, **options):
    return [CONV[d](*channels, **options), NORM[d](channels[1]), nn.PReLU() if act is None else act]


ROWS = {
    "same": lambda d: block(d, 4, 6, kernel_size=3, padding=1) + block(d, 6, 5, kernel_size=1, act=nn.LeakyReLU(0.1)),
    "stride": lambda d: block(d, 4, 6, kernel_size=3, stride=2, padding=1, bias=False) + block(d, 6, 16, kernel_size=1, stride=2) + block(d, 16, 4, kernel_size=1, stride=2),
    "strides apart": lambda d: block(d, 4, 5, kernel_size=first(d, (4, 3, 2)), stride=first(d, (3, 1, 2)), padding=first(d, (1, 2, 0))),
    "dilation": lambda d: block(d, 4, 6, kernel_size=first(d, (3, 2, 3)), padding=first(d, (2, 1, 0)), dilation=first(d, (2, 3, 1))),
    "groups": lambda d: block(d, 4, 4, kernel_size=3, padding=1, groups=4, act=nn.ReLU()) + block(d, 4, 6, kernel_size=1, groups=2),
    "no norm": lambda d: [CONV[d](4, 6, 3, padding=1), nn.ReLU(), POOL[d](3, 2, 1), CONV[d](6, 5, 1), nn.PReLU(), *block(d, 5, 5, kernel_size=3, padding=1), CONV[d](5, 3, 1)],
}  # fmt: skip
CASES = [(kind, dims) for dims in (3, 1) for kind in ROWS]


def row(kind, dims):
    torch.manual_seed(0)
    return stirred(Stack(*ROWS[kind](dims)))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("kind", "dims"), CASES)
def test_equals_the_modules_on_whole_maps(kind, dims, train, banded):  # noqa: F811
    stack = row(kind, dims).double().train(train)
    sizes = (1, 1), (2, 900), (3, 1 << 20)  # images, and bytes of a band
    assert_equals_whole_maps(stack, sizes, SIZE[dims])
    assert len(banded) == len(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["same", "stride", "no norm"])
def test_makes_at_most_twice_the_error_of_plain(kind, dtype, banded):  # noqa: F811
    assert_twice_plain_at_most(row(kind, 3), (2, 4, 16, 14, 12), dtype)
    assert banded


def test_autocast_is_that_of_plain(banded):  # noqa: F811
    assert_autocast_of_plain(row("same", 3), 2e-2)
    assert banded


@pytest.mark.parametrize("dims", [1, 3])
def test_a_second_derivative_and_frozen_parts(dims, banded):  # noqa: F811
    stack = row("no norm", dims).double()
    assert_second_derivative_and_frozen_parts(stack, SIZE[dims], (slice(3), slice(4, None)))
    assert banded


@pytest.mark.parametrize("dims", [1, 3])
def test_stacks_heads_and_streams(dims, banded):  # noqa: F811
    stack, x = row("same", dims).double(), small_input(2, 4, *SIZE[dims])
    plain = step(Plain(stack), x)
    stack.bands = Bands(700)
    assert_same_result(step(copy.deepcopy(stack), x), plain, 1e-9)
    assert_same_result(step(Recompute(copy.deepcopy(stack)), x), plain, 1e-9)
    head = stirred(CONV[dims](4, 4, 3, 2, 1)).double()
    assert_same_result(step(HeadByBands(copy.deepcopy(head), Bands(700)), x), step(head, x), 1e-9)
    streams = ByBands(head, Bands(700), streams=True)
    torch.testing.assert_close(torch.cat(streams(tuple(x.chunk(2, 1))), 1), head(x))
    assert len(banded) == (3 if dims == 3 else 2)  # no signals as functions, which must not depend on bands


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2}, {"groups": 4}, {"kernel_size": (1, 3, 3), "padding": (0, 1, 1)}], ids=str)  # fmt: skip
def test_bands_of_volumes_have_the_bits_of_the_whole(options, dtype, images):
    """In channels_last_3d, of several volumes or a large one: a band of one runs as these do."""
    conv = nn.Conv3d(8, 12, **{"kernel_size": 3, "padding": 1, **options}).to(dtype)
    op, parameters = Convolution.of(conv), [conv.weight.detach(), conv.bias.detach()]
    x = small_input(2, 8, 11, 10, 9, dtype=dtype).detach().contiguous(memory_format=torch.channels_last_3d)
    whole = conv(x).detach()[:images]
    for low, high in ((0, 3), (3, 4), (whole.shape[2] - 3, whole.shape[2])):
        band = op.make_band(Band(x[:images], 0, 11), low, high, parameters)
        assert torch.equal(band, whole[:, :, low:high])


@pytest.mark.parametrize("norm", [nn.BatchNorm3d, nn.InstanceNorm3d])
@pytest.mark.parametrize("exact", [True, "lossless"])
def test_sequences_of_volumes_are_inverted_exactly(exact, norm, banded):  # noqa: F811
    """The second run cuts maps otherwise than the first, and finds the same bits, or it would raise an error."""

    def f():
        first, second = (nn.Conv3d(*channels, 3, padding=1) for channels in ((4, 6), (6, 4)))
        stack = Stack(first, norm(6, affine=True), nn.PReLU(), second, norm(4, affine=True), nn.ReLU())
        stack.bands = Bands(1 << 14)  # both images in the first run, one in the second
        return stirred(stack)

    torch.manual_seed(0)
    sequence = ReversibleSequence([AdditiveCoupling(f(), f())], exact=exact)
    twin, x = plain_twin(sequence), small_input(2, 8, 14, 9, 10, dtype=torch.float32)
    assert_same_result(step(sequence, x), step(twin, x), 1e-3)
    assert len(banded) == 2


@pytest.mark.parametrize("dims", [2, 3])
def test_one_map_without_a_batch_goes_through_the_modules(dims, banded):  # noqa: F811
    stack, x = row("no norm", dims).double(), small_input(2, 4, *SIZE[dims])[0].detach()
    stack = Stack(*[module for module in stack if not isinstance(module, NORM[dims])])
    stack.bands = Bands(700)
    torch.testing.assert_close(stack(x), Plain(stack)(x))
    torch.testing.assert_close(ByBands(stack, Bands(700))(x), Plain(stack)(x))
    assert not banded


@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("kernel", [1, 3])
def test_bands_of_volumes_stay_in_channels_last(kernel, channels):
    """Contiguous ones, as a single channel or a pointwise convolution gives them, are copied by all that follows."""
    conv, layout = nn.Conv3d(channels, 8, kernel, padding=kernel // 2), torch.channels_last_3d
    x = Whole(torch.randn(2, channels, 6, 5, 4)).rows(slice(0, 2), 0, 6, layout)
    with torch.no_grad():
        whole = conv(x)
        for images in (1, 2):
            band = Convolution.of(conv).make_band(Band(x[:images], 0, 6), 1, 5, [conv.weight, conv.bias])
            torch.testing.assert_close(band, whole[:images, :, 1:5])
            assert is_channels_last(band)
    assert is_channels_last(whole) or kernel == 1  # as an operation reads the layout of what it is given


@pytest.mark.parametrize("dims", [2, 3])
def test_a_single_column_of_a_single_channel_reads_no_other_memory(dims):
    """In channels_last oneDNN reads beyond such a map: the values were those of what lies behind it."""
    conv, size = CONV[dims](1, 8, 3, (*(1,) * (dims - 1), 2), (*(0,) * (dims - 1), 1)), (6,) * (dims - 1)
    memory = torch.full((1000,), torch.nan)
    x = memory[: 2 * 6 ** (dims - 1) * 2].view(2, 1, *size, 2).normal_()
    band = x.as_strided(x.shape, (x.stride(0), 1, *x.stride()[2:]))
    with torch.no_grad():
        found = Convolution.of(conv).make_band(Band(band, 0, 6), 0, 4, [conv.weight, conv.bias])
        torch.testing.assert_close(found, conv(x))
