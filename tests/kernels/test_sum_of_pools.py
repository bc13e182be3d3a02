"""The sum of pools in one pass, against the pools one after another."""

import pytest
import torch
import torch.nn.functional as F

from revseg.kernels.sum_of_pools import op
from revseg.ops import sum_of_pools, sum_of_pools_backward
from tests.helpers import small_input

PYRAMIDS = [(3, 5, 7), (3,), (5,), (1, 3), (7, 9), (1,), (5, 5)]
HALF = (torch.float16, torch.bfloat16)

pyramids = pytest.mark.parametrize("sizes", PYRAMIDS, ids=str)
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)


def around(sizes):
    """Lengths on both sides of that from which strips are used, odd and even."""
    first = 8 * max(sizes)
    return [1, first - 1, first, first + 1, first + 2, first + 3, first + 4]


def pools(x, sizes):
    return sum(F.avg_pool2d(x, k, stride=2, padding=k // 2, count_include_pad=False) for k in sizes)


def gradient(x, dy, sizes):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(pools(x, sizes), x, dy)[0]


def assert_near(a, b, tolerance=1e-12):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert (a - b).abs().max() <= tolerance


@pyramids
@pytest.mark.parametrize("which", range(7))
def test_equals_the_pools_and_their_gradient(sizes, which):
    lengths = around(sizes)
    for size in ((lengths[which], lengths[-1]), (lengths[-2], lengths[which])):
        x = small_input(2, 3, *size, requires_grad=False)
        y = sum_of_pools(x, sizes)
        assert_near(y, pools(x, sizes))
        dy = small_input(*y.shape, seed=1, requires_grad=False)
        assert_near(sum_of_pools_backward(dy, x, sizes), gradient(x, dy, sizes))


@pyramids
def test_forward_and_backward_are_adjoint(sizes):
    """<dy, A x> = <A' dy, x>, for one long pair of vectors; and each row of A by itself at the rim."""
    for size in zip(around(sizes)[3:], around(sizes)[:2:-1], strict=True):
        x = small_input(1, 2, *size, requires_grad=False)
        y = sum_of_pools(x, sizes)
        dy = small_input(*y.shape, seed=1, requires_grad=False)
        there, back = (dy * y).sum(), (sum_of_pools_backward(dy, x, sizes) * x).sum()
        torch.testing.assert_close(there, back, rtol=1e-12, atol=1e-12)


def test_every_pixel_of_the_rim_is_counted_once():
    """A map of ones: each pool gives one, and gradients sum to as many as there are pools for each output."""
    sizes, x = (3, 5, 7), torch.ones(1, 1, 61, 58, dtype=torch.float64)
    y = sum_of_pools(x, sizes)
    assert_near(y, torch.full_like(y, 3.0))
    dx = sum_of_pools_backward(torch.ones_like(y), x, sizes)
    torch.testing.assert_close(dx.sum(), y.sum())


@layouts
@pyramids
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_makes_at_most_twice_the_error_of_the_pools(layout, sizes, dtype):
    length = around(sizes)[3]
    x = small_input(2, 4, length, length + 1, dtype=dtype, requires_grad=False)
    x = x.contiguous(memory_format=layout)
    y = sum_of_pools(x, sizes)
    dy = small_input(*y.shape, dtype=dtype, seed=1, requires_grad=False)
    dx = sum_of_pools_backward(dy, x, sizes)
    assert y.dtype == dx.dtype == dtype
    exact = pools(x.double(), sizes), gradient(x.double(), dy.double(), sizes)
    plain = pools(x, sizes), gradient(x, dy, sizes)
    for found, other, truth in zip((y, dx), plain, exact, strict=True):
        mine, theirs = ((values.double() - truth).norm() for values in (found, other))
        assert mine <= 2 * theirs


@layouts
@pyramids
def test_any_strides(layout, sizes):
    length = around(sizes)[3]
    x = small_input(2, 3, length, length + 1, requires_grad=False).contiguous(memory_format=layout)
    y = sum_of_pools(x, sizes)
    assert_near(y, pools(x, sizes))
    dy = small_input(*y.shape, seed=1, requires_grad=False)
    expected = gradient(x, dy, sizes)
    apart = torch.cat((torch.zeros_like(dy), dy), 1)[:, dy.shape[1] :]
    turned = dy.transpose(2, 3).contiguous().transpose(2, 3)
    for strides in (apart, turned, dy.contiguous(memory_format=torch.channels_last)):
        before = strides.clone()
        assert_near(sum_of_pools_backward(strides, x, sizes), expected)
        assert torch.equal(strides, before)
    one = dy[:1, :1, :1, :1].expand_as(dy)
    assert_near(sum_of_pools_backward(one, x, sizes), gradient(x, one, sizes))


@pyramids
def test_the_gradient_does_not_depend_on_the_values_of_the_input(sizes):
    """So a map of the same shape may stand for it, even one of NaN."""
    for length in around(sizes)[:4]:
        x = small_input(1, 2, length, length, requires_grad=False)
        dy = small_input(1, 2, (length + 1) // 2, (length + 1) // 2, seed=1, requires_grad=False)
        expected = sum_of_pools_backward(dy, x, sizes)
        assert torch.equal(sum_of_pools_backward(dy, torch.full_like(x, float("nan")), sizes), expected)


@pytest.mark.parametrize("length", [25, 26, 27])
def test_strips_are_used_where_the_map_is_large(monkeypatch, length):
    """Else nothing above would test them: the pools themselves see thin strips alone."""
    seen = []

    def watched(x, sizes):
        seen.append(tuple(x.shape[2:]))
        return pools(x, sizes)

    monkeypatch.setattr(op, "reference", watched)
    sum_of_pools(torch.zeros(1, 1, length, length), (3,))
    assert len(seen) == 4
    assert max(map(min, seen)) <= 4
    seen.clear()
    sum_of_pools(torch.zeros(1, 1, 24, 24), (3,))
    assert seen == [(24, 24)]


def test_a_nan_reaches_its_own_windows_alone():
    x = small_input(1, 1, 33, 31, requires_grad=False)
    x[0, 0, 16, 15] = float("nan")
    found = sum_of_pools(x, (3,))
    assert torch.equal(found.isnan(), pools(x, (3,)).isnan())
