"""Rows of layers with instance norm by bands, against the modules they are made of: each image is a batch of its own."""

import copy

import pytest
import torch
from torch import nn

from revseg import Stack
from revseg.layers.bands.cut import Bands
from revseg.layers.bands.module import ByBands
from revseg.layers.recompute import Recompute
from revseg.layers.stack import layers_of
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
BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
SIZE = {1: (17,), 2: (9, 8), 3: (7, 6, 5)}


def block(d, *channels, norm=None, affine=True, act=None, **options):
    """A block of nnU-Net."""
    options = {"kernel_size": 3, "padding": 1, **options}
    norm = {"affine": affine, **(norm or {})}
    act = nn.LeakyReLU(0.01, inplace=True) if act is None else act
    return [CONV[d](*channels, **options), NORM[d](channels[1], **norm), act]


ROWS = {
    "nnU-Net": lambda d: block(d, 4, 6, stride=2) + block(d, 6, 5),
    "not affine": lambda d: block(d, 4, 6, affine=False) + block(d, 6, 4, groups=2, act=nn.PReLU(), bias=False),
    "running": lambda d: block(d, 4, 6, norm={"track_running_stats": True}) + block(d, 6, 4, dilation=2, norm={"track_running_stats": True, "momentum": 0.3}),
    "no momentum": lambda d: block(d, 4, 4, norm={"track_running_stats": True, "momentum": None}),
    "no activation": lambda d: [*block(d, 4, 5)[:2], *block(d, 5, 4, act=nn.ReLU()), *block(d, 4, 4)[:2]],
    "pools and heads": lambda d: [*block(d, 4, 5, affine=False), POOL[d](2), *block(d, 5, 6, affine=False), CONV[d](6, 4, 1), nn.ReLU(), CONV[d](4, 3, 1)],
}  # fmt: skip
CASES = [(kind, dims) for kind in ROWS for dims in (3, 2)] + [("nnU-Net", 1), ("running", 1)]


def row(kind, dims):
    torch.manual_seed(0)
    return stirred(Stack(*ROWS[kind](dims)))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("kind", "dims"), CASES)
def test_equals_the_modules_on_whole_maps(kind, dims, train, banded):  # noqa: F811
    stack = row(kind, dims).double().train(train)
    sizes = (1, 1), (2, 700), (3, 1 << 20)  # images, and bytes of a band
    assert_equals_whole_maps(stack, sizes, SIZE[dims])
    assert len(banded) == len(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nnU-Net", "not affine"])
def test_makes_at_most_twice_the_error_of_plain(kind, dtype, banded):  # noqa: F811
    found = assert_twice_plain_at_most(row(kind, 3), (3, 4, 13, 12, 10), dtype)
    assert {n: g.dtype for n, g in found.gradients.items()} == dict.fromkeys(found.gradients, dtype)
    assert banded


def test_autocast_is_that_of_plain(banded):  # noqa: F811
    assert_autocast_of_plain(row("nnU-Net", 3), 3e-2)
    assert banded


@pytest.mark.parametrize("kind", ["nnU-Net", "running"])
def test_a_second_derivative_and_frozen_parts(kind, banded):  # noqa: F811
    stack = row(kind, 3).double()
    assert_second_derivative_and_frozen_parts(stack, SIZE[3], (slice(2), slice(3, None), slice(1, None)))
    assert banded


def test_running_statistics_count_once(banded):  # noqa: F811
    """In a stack as a function, and where a row that goes by bands runs again inside of another."""
    stack, x = row("running", 3).double(), small_input(2, 4, *SIZE[3])
    plain = step(Plain(stack), x)
    stack.bands = Bands(700)
    assert_same_result(step(Recompute(copy.deepcopy(stack)), x), plain, 1e-9)
    inside = Recompute(nn.Sequential(copy.deepcopy(stack), nn.Identity()))
    found, expected = step(inside, x), plain.buffers.values()
    torch.testing.assert_close([*found.buffers.values()], [*expected])
    torch.testing.assert_close(found.outputs, plain.outputs)
    assert banded


def test_a_stack_goes_by_bands_where_statistics_allow():
    """Statistics of a batch and of each image do not go together, nor do those of an image and an op that is not local."""
    torch.manual_seed(0)
    modules = [
        *block(3, 4, 6),
        *(nn.Conv3d(6, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU()),
        *block(3, 4, 4),
        *(nn.ConvTranspose3d(4, 4, 2, 2), nn.BatchNorm3d(4), nn.ReLU()),
        *block(3, 4, 4, norm={"track_running_stats": True}),
        nn.Dropout3d(0.0),
        nn.Conv3d(4, 3, 1),
    ]
    stack = stirred(Stack(*modules)).double()
    x = small_input(2, 4, *SIZE[3])
    for train in (True, False):
        plain = step(Plain(stack).train(train), x)
        for wrapped in (ByBands(copy.deepcopy(stack)), copy.deepcopy(stack)):
            wrapped.train(train).bands = Bands(700)
            assert_same_result(step(wrapped, x), plain, 1e-9)
    assert layers_of(stack, 3) is None


@pytest.mark.parametrize("change", ["features", "hook", "subclass"])
@pytest.mark.filterwarnings("ignore:input's size")
def test_what_is_not_known_runs_as_before(change, banded):  # noqa: F811
    stack = row("not affine", 3).double()
    if change == "features":  # of which PyTorch only warns
        stack[1].num_features = 5
    elif change == "hook":
        stack[1].register_forward_hook(lambda *_: None)
    else:
        stack[1].__class__ = type("Norm", (nn.InstanceNorm3d,), {})
    x = small_input(2, 4, *SIZE[3])
    assert_same_result(step(ByBands(stack, Bands(700)), x), step(Plain(stack), x), 1e-9)
    assert not banded


def test_refuses_what_pytorch_refuses(banded):  # noqa: F811
    """Running statistics that are asked for where there are none."""
    stack, x = row("not affine", 3).double().eval(), small_input(2, 4, *SIZE[3])
    stack[1].track_running_stats = True
    for model in (ByBands(stack), stack):
        with pytest.raises(RuntimeError, match="running_mean and running_var to be defined"):
            model(x)
    assert not banded


def test_one_value_has_no_variance():
    stack = Stack(*block(3, 4, 4))
    for model in (ByBands(copy.deepcopy(stack)), stack):
        with pytest.raises(ValueError, match="more than 1 spatial element"):
            model(torch.randn(2, 4, 1, 1, 1))
