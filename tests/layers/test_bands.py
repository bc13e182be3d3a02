"""Rows of layers by bands against the modules they are made of, run on whole maps.

Sums go band by band, so their bits are not those of the whole map: statistics, and with them all that follows, round
otherwise. So float64 is compared up to its rounding, and lower dtypes make at most twice the error of plain PyTorch.
"""

import copy

import pytest
import torch
from torch import nn

from revseg.engine.function import Function
from revseg.layers.bands.cut import Bands
from revseg.layers.bands.module import ByBands
from revseg.layers.bands.row import BandedRow
from revseg.layers.bands.rows import Band
from revseg.layers.blocks import ConvBNAct, ImageConvBNAct, asymmetric_pairs
from revseg.layers.convolution import Convolution
from revseg.layers.images import normalize_images
from revseg.layers.recompute import Recompute
from revseg.layers.stack import Stack
from tests.helpers import assert_same_result, relative_error, run_step, small_input
from tests.layers.stack_twins import Plain, by_name, layer, stirred

ROWS = {
    "prelu": lambda: [layer(8, 6), layer(6, 5)],
    "fixed slopes": lambda: [layer(8, 6, activation="relu"), layer(6, 5, act=nn.LeakyReLU(-0.5)), layer(5, 4, act=nn.Identity())],
    "shared slope": lambda: [layer(8, 6, activation="prelu_shared")],
    "bias": lambda: [layer(8, 6, bias=True), layer(6, 5, 1, bias=True)],
    "depthwise": lambda: [layer(8, 8, groups=8), layer(8, 6, 1, groups=2), layer(6, 12, 3, groups=3, stride=2)],
    "stride": lambda: [layer(8, 6, stride=2), layer(6, 5, (3, 1), stride=2), layer(5, 4, 1, stride=2), layer(4, 4)],
    "dilation": lambda: [layer(8, 6, dilation=2), layer(6, 5, (3, 1), dilation=8), layer(5, 5, (1, 3), dilation=3)],
    "padding": lambda: [layer(8, 6, conv=nn.Conv2d(8, 6, 3, padding=(0, 2))), layer(6, 5, conv=nn.Conv2d(6, 5, 4, 3, 1))],
    "affine off": lambda: [layer(8, 6, bn=nn.BatchNorm2d(6, affine=False)), layer(6, 5)],
    "no running": lambda: [layer(8, 6, bn=nn.BatchNorm2d(6, track_running_stats=False)), layer(6, 5)],
    "no norm": lambda: [layer(8, 6), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.PReLU(), layer(4, 5)],
    "pool": lambda: [layer(8, 6), nn.MaxPool2d(3, 2, 1), layer(6, 5), nn.MaxPool2d(2), nn.Conv2d(5, 4, 1), nn.MaxPool2d(3, 1, 1)],
    "linear end": lambda: [layer(8, 6), layer(6, 6, stride=2), nn.Conv2d(6, 5, 3, padding=1)],
    "long": lambda: [*asymmetric_pairs(8, (1, 2, 4))],
}  # fmt: skip
SIZES = [
    (1, 1),
    (2, 700),
    (3, 1500),
    (3, 1 << 20),
]  # images, and bytes of a band: rows of one, or several images


def step(module, x):
    result = run_step(module, x)
    names = (result.gradients, result.buffers)
    result.gradients, result.buffers = (
        by_name({n.removeprefix("module."): g for n, g in each.items()}) for each in names
    )
    return result


@pytest.fixture
def banded(monkeypatch):
    """How many rows went by bands."""
    count = []
    make = BandedRow.__init__
    monkeypatch.setattr(BandedRow, "__init__", lambda *a: count.append(1) or make(*a))
    return count


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ROWS)
def test_equals_the_modules_on_whole_maps(kind, train, banded):
    for kept, (images, size) in zip((0, 0.5, 2, 3), SIZES, strict=True):
        stack = stirred(Stack(*ROWS[kind]())).double().train(train)
        ours = ByBands(copy.deepcopy(stack), Bands(size, kept))
        x = small_input(images, 8, 13, 11)
        assert_same_result(step(ours, x), step(Plain(stack), x), 1e-9)
    assert len(banded) == len(SIZES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["stride", "depthwise", "long"])
def test_makes_at_most_twice_the_error_of_plain(kind, dtype, banded):
    stack = stirred(Stack(*ROWS[kind]()))
    exact = step(Plain(stack).double(), small_input(2, 8, 40, 24))
    ours, plain = ByBands(copy.deepcopy(stack), Bands(6000)).to(dtype), Plain(stack).to(dtype)
    found, rounded = (step(m, small_input(2, 8, 40, 24, dtype=dtype)) for m in (ours, plain))
    assert relative_error(found.gradients, exact.gradients) <= 2 * relative_error(
        rounded.gradients, exact.gradients
    )
    assert banded


def test_autocast_and_bytes_are_those_of_plain():
    stack = stirred(Stack(ImageConvBNAct(3, 4, stride=2), layer(4, 5)))
    images = torch.randint(0, 256, (2, 3, 21, 18), dtype=torch.uint8)
    ours, plain = ByBands(copy.deepcopy(stack), Bands(900)), Plain(stack)
    for cast, bound in ((False, 1e-5), (True, 5e-2)):
        found = []
        for model in (ours, plain):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                y = model(images if model is ours else normalize_images(images))
            y.float().square().mean().backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters()})
            model.zero_grad()
        assert y.dtype == (torch.bfloat16 if cast else torch.float32)
        assert relative_error(dict(zip(found[1], found[0].values(), strict=True)), found[1]) < bound


def test_streams_go_in_and_come_out(banded):
    stack = stirred(Stack(layer(8, 6), layer(6, 4, stride=2))).double()
    ours = ByBands(copy.deepcopy(stack), Bands(800), streams=True)
    x = small_input(2, 8, 9, 7)
    halves = [half.detach().requires_grad_() for half in x.chunk(2, 1)]
    y1, y2 = ours(tuple(halves))
    y = stack(x)
    assert y1.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.cat((y1, y2), 1), y)
    dy = small_input(*y.shape, seed=3, requires_grad=False)
    (dx,) = torch.autograd.grad(y, x, dy)
    found = torch.autograd.grad((y1, y2), halves, tuple(dy.chunk(2, 1)), retain_graph=True)
    torch.testing.assert_close(torch.cat(found, 1), dx)
    alone = torch.autograd.grad(y2, halves, dy[:, 2:])  # the other one has no gradient
    whole = torch.autograd.grad(stack(x), x, torch.cat((torch.zeros_like(dy[:, 2:]), dy[:, 2:]), 1))
    torch.testing.assert_close(torch.cat(alone, 1), whole[0])
    assert banded == [1]


def test_a_second_derivative_and_frozen_parts(banded):
    stack = stirred(Stack(layer(4, 4), nn.Conv2d(4, 4, 1), nn.PReLU(), layer(4, 4))).double()
    ours, x = ByBands(copy.deepcopy(stack), Bands(300)), small_input(2, 4, 5, 6)
    penalties = []
    for model in (ours, Plain(stack)):
        (dx,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(dx.square().sum(), [*model.parameters()]))
    torch.testing.assert_close(*penalties)
    names = [name for name, _ in stack.named_parameters()]
    for frozen in (names[:3], names[4:], names[1:]):
        ours, twin = ByBands(copy.deepcopy(stack), Bands(300)), Plain(stack)
        for name, p in zip(names * 2, [*ours.parameters(), *twin.parameters()], strict=True):
            p.requires_grad_(name not in frozen)
        for given in (x, x.detach()):
            results = [step(model, given) for model in (ours, twin)]
            assert_same_result(*results, 1e-9)


def test_a_stack_runs_by_bands_as_a_function(banded):
    stack = stirred(Stack(*ROWS["long"]())).double()
    plain = Plain(stack)
    stack.bands = Bands(1000)
    x = small_input(2, 8, 13, 11)
    assert_same_result(step(Recompute(stack), x), step(plain, x), 1e-9)
    function: Function = stack.as_function(x)
    stream = small_input(2, 8, 13, 11, seed=5)
    (y, dtype), alone = function.run(x, (stream, 1)), function.run(x, None)
    torch.testing.assert_close(y, stream + alone[0])
    assert (dtype, alone[1]) == (torch.float64, None)
    assert function.run(x, (stream[:, :4], 1))[1] is None  # does not fit
    assert len(banded) == 2


def test_what_is_not_local_runs_as_before(banded):
    transposed = Stack(layer(8, 6), layer(6, 4, conv=nn.ConvTranspose2d(6, 4, 2, 2))).double()
    dropped = Stack(layer(8, 8), nn.Dropout2d(0.0)).double()
    for module in (transposed, dropped):
        ours = ByBands(copy.deepcopy(module), Bands(500))
        x = small_input(2, 8, 6, 5)
        assert_same_result(step(ours, x), step(Plain(module), x), 1e-9)
    assert not banded


@pytest.mark.parametrize(
    "options", [{"dilation": 8}, {"stride": 2}, {"groups": 16}, {"kernel": (1, 7)}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_band_of_a_convolution_has_the_bits_of_the_whole_map(options, dtype):
    """In channels_last; so the streams of exact modes do not depend on how they were cut."""
    conv = ConvBNAct(16, 16, **{"kernel": 3, **options})[0].to(dtype)
    op = Convolution.of(conv)
    x = small_input(1, 16, 23, 32, dtype=dtype).detach().contiguous(memory_format=torch.channels_last)
    whole = conv(x).detach()
    for first, last in ((0, 3), (3, 8), (whole.shape[2] - 4, whole.shape[2])):
        with torch.no_grad():
            assert torch.equal(
                op.make_band(Band(x, 0, 23), first, last, [conv.weight]), whole[:, :, first:last]
            )


def test_refuses_bands_of_nothing():
    with pytest.raises(ValueError, match="bytes and part of at least 1"):
        Bands(0)
    with pytest.raises(ValueError, match="kept of at least 0"):
        Bands(kept=-1)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module"):
        ByBands("stem")


def test_the_state_dict_has_the_names_of_the_module():
    stack = Stack(layer(8, 6))
    assert ByBands(stack).state_dict().keys() == stack.state_dict().keys()
    ByBands(Stack(layer(8, 6))).load_state_dict(stack.state_dict())
