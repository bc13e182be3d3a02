"""Maps that rows by bands read as they are made: rows and gradients against PyTorch's functions on whole maps."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg.layers.bands.cut import Bands
from revseg.layers.bands.local import Joined, Local, Pooled, Repeated, Resized, Transposed
from revseg.layers.bands.rows import Whole
from revseg.layers.bands.sources import run_of_source
from revseg.layers.stack import layers_in

CONV = {2: F.conv_transpose2d, 3: F.conv_transpose3d}
POOL = {2: F.max_pool2d, 3: F.max_pool3d}
LINEAR = {2: "bilinear", 3: "trilinear"}


def transposed(kernel, stride=1, padding=0, extra=0, groups=1, dilation=1, bias=True):
    def made(x):
        dims = x.ndim - 2
        k, s, p, o, d = (
            (v,) * dims if isinstance(v, int) else v[:dims]
            for v in (kernel, stride, padding, extra, dilation)
        )
        others = [torch.randn(x.shape[1], 6 // groups, *k, dtype=x.dtype)]
        others += [torch.randn(6, dtype=x.dtype)] if bias else []
        rule = Transposed(k, s, p, o, groups, d, None)
        return rule, others, lambda y, w, b=None: CONV[dims](y, w, b, s, p, o, groups, d)

    return made


def resized(size, align_corners=False):
    def made(x):
        asked = size[: x.ndim - 2]
        mode = LINEAR[x.ndim - 2]
        return Resized(asked, align_corners), [], lambda y: F.interpolate(y, asked, mode=mode, align_corners=align_corners)  # fmt: skip

    return made


def repeated(*times):
    def made(x):
        asked = times[: x.ndim - 2]
        return Repeated(asked), [], lambda y: F.interpolate(y, scale_factor=asked)

    return made


def pooled(kernel, stride, padding=0, dilation=1):
    def made(x):
        dims = x.ndim - 2
        settings = [
            (v,) * dims if isinstance(v, int) else v[:dims] for v in (kernel, stride, padding, dilation)
        ]
        return Pooled(*settings), [], lambda y: POOL[dims](y, *settings)

    return made


RULES = {
    "raised by 2": transposed(2, 2),
    "raised, overlapping": transposed(4, 2, 1, bias=False),
    "raised, uneven": transposed((3, 2, 3), (2, 1, 1), (1, 0, 1), (0, 0, 0), groups=2),
    "raised, wider": transposed((3, 3, 3), (1, 2, 2), 1, (0, 1, 0)),
    "raised, dilated": transposed((2, 3, 1), (2, 2, 1), (1, 2, 0), dilation=(3, 2, 1)),
    "linear by 2": resized((14, 10, 6)),
    "linear, odd": resized((17, 13, 7)),
    "linear, corners": resized((16, 5, 9), align_corners=True),
    "linear of one dimension": resized((7, 11, 3)),
    "nearest": repeated(2, 3, 1),
    "pool": pooled(2, 2),
    "pool, overlapping": pooled(3, 2, 1),
    "pool, dilated": pooled((3, 2, 2), (1, 2, 1), (1, 1, 0), (2, 1, 1)),
}
SIZES = {"maps": (3, 4, 7, 5), "volumes": (3, 4, 7, 5, 3)}
CUTS = [(1, 1), (2, 3), (3, 100)]  # images and rows of a band


def off(x, exact):
    """Relative error."""
    return ((x.double() - exact).norm() / exact.norm()).item()


def bands(source, images, rows):
    for i, first in itertools.product(range(0, source.shape[0], images), range(0, source.shape[2], rows)):
        yield slice(i, i + images), first, min(first + rows, source.shape[2])


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(("images", "rows"), CUTS)
def test_rows_and_their_gradients_are_those_of_the_map(rule, size, images, rows):
    x = torch.randn(size, dtype=torch.float64)
    of_map, others, function = rule(x)
    leaves = [each.clone().requires_grad_() for each in (x, *others)]
    whole = function(*leaves)
    source = Local(of_map, x, *others)
    assert tuple(source.shape) == tuple(whole.shape)
    assert torch.equal(source.plain(), whole)
    dy = torch.randn_like(whole)
    gradient = source.like()
    for here, first, last in bands(source, images, rows):
        torch.testing.assert_close(source.rows(here, first, last, None), whole[here, :, first:last])
        gradient.write(here, first, dy[here, :, first:last])
    expected = torch.autograd.grad(whole, leaves, dy)
    for ours, plain in zip(gradient.parts, expected, strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_row_of_what_is_joined_and_raised():
    """As in a U-Net, beside the modules on whole maps, in float32 and against float64; no map is kept but the small ones."""
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(8, 4, 2, 2)
    row = nn.Sequential(
        nn.Conv2d(13, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3, 2, 1)
    )
    skip, low, coarse = torch.randn(3, 5, 12, 10), torch.randn(3, 8, 6, 5), torch.randn(3, 4, 3, 5)
    options = {"mode": "bilinear", "align_corners": False}

    def plain(module, raised, *maps):
        return module(torch.cat([maps[0], raised(maps[1]), F.interpolate(maps[2], (12, 10), **options)], 1))

    def by_bands(module, raised, *maps):
        def make(x, y, weight, bias, z):
            rule = Transposed((2, 2), (2, 2), (0, 0), (0, 0), 1, (1, 1), None)
            return Joined(Whole(x), Local(rule, y, weight, bias), Local(Resized((12, 10), False), z))

        layers = layers_in(module, without_norm=True)
        return run_of_source(layers, make, [*maps[:2], raised.weight, raised.bias, maps[2]], Bands(bytes=700))

    def step(run, dtype):
        module, raised = (nn.Sequential(*row).to(dtype), nn.ConvTranspose2d(8, 4, 2, 2).to(dtype))
        module.load_state_dict(row.state_dict())
        raised.load_state_dict(up.state_dict())
        maps = [each.to(dtype).clone().requires_grad_() for each in (skip, low, coarse)]
        y = run(module, raised, *maps)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape, dtype=torch.float64).to(dtype))
        return [y, *(each.grad for each in (*maps, *module.parameters(), *raised.parameters()))]

    exact = step(plain, torch.float64)
    for ours, wide in zip(step(by_bands, torch.float64), exact, strict=True):
        assert off(ours, wide) < 1e-9
    for ours, theirs, wide in zip(
        step(by_bands, torch.float32), step(plain, torch.float32), exact, strict=True
    ):
        assert off(ours, wide) <= max(2 * off(theirs, wide), 2e-6)


@pytest.mark.parametrize("last", [[], [nn.Conv2d(6, 2, 1)]], ids=["norm", "linear"])
@pytest.mark.parametrize(("kernel", "taken"), [(3, True), ((2, 3), False)], ids=["same", "shorter"])
def test_the_gradient_of_a_joined_map_lies_where_that_of_the_row_did(last, kernel, taken, monkeypatch):
    """Rows of it are written over those that were read."""
    found, taking = [], Joined.taking
    monkeypatch.setattr(Joined, "taking", lambda *args: found.append(taking(*args)) or found[-1])
    torch.manual_seed(0)
    first = nn.Conv2d(9, 6, kernel, padding=(kernel if isinstance(kernel, int) else 0) // 2)
    wide = nn.Conv2d(6, 6, 3, padding=1)
    row = nn.Sequential(
        first, nn.BatchNorm2d(6), nn.ReLU(), wide, nn.BatchNorm2d(6), nn.ReLU(), *last
    ).double()
    low, skip = (torch.randn(3, c, 12, 10).double() for c in (3, 6))
    maps = [x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in (low, skip)]
    layers = layers_in(row, without_norm=True)
    y = run_of_source(layers, lambda *x: Joined(*map(Whole, x)), maps, Bands(bytes=700, kept=0))
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, [*maps, *row.parameters()], dy)
    plain = torch.autograd.grad(row(torch.cat(maps, 1)), [*maps, *row.parameters()], dy)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
    assert any(each is not None for each in found) == taken


def test_gradients_of_gradients():
    low = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    row = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(2), nn.PReLU()).double()
    layers = layers_in(row, without_norm=True)

    def second(y):
        (of_low,) = torch.autograd.grad(y.square().sum(), low, create_graph=True)
        return torch.autograd.grad(of_low.square().sum(), [low, *row.parameters()])

    rule = Resized((8, 8), False)
    ours = second(run_of_source(layers, lambda x: Local(rule, x), [low], Bands(bytes=1)))
    plain = second(row(F.interpolate(low, (8, 8), mode="bilinear")))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
