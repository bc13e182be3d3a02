"""The sum of pools as Triton kernels, against the pools of PyTorch one after another."""

import pytest
import torch
import torch.nn.functional as F
from triton.runtime.interpreter import interpreter_builder

from revseg.kernels.sum_of_pools import gpu, op
from revseg.kernels.sum_of_pools.op import sum_of_pools, sum_of_pools_backward
from tests.helpers import small_input
from tests.interpreted.guarded import guarded, survives

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PYRAMIDS = [(3, 5, 7), (5, 3), (1, 3), (1,), (5, 5), (9,)]
ODD = (2, 4, 9, 7)

layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)


@pytest.fixture(autouse=True)
def _no_plain_version(monkeypatch):
    monkeypatch.setattr(op, "_uses_strips", None)


def maps(size=ODD, dtype=F32, layout=torch.contiguous_format):
    """An input and a gradient of the output."""
    small = (*size[:2], *((length + 1) // 2 for length in size[2:]))
    x, dy = (small_input(*s, dtype=dtype, seed=i, requires_grad=False) for i, s in enumerate((size, small)))
    return x.contiguous(memory_format=layout), dy.contiguous(memory_format=layout)


def ours(x, dy, sizes):
    return sum_of_pools(x, sizes), sum_of_pools_backward(dy, x, sizes)


def pools(x, dy, sizes):
    """The pools one after another, and their gradient."""
    x = x.detach().requires_grad_()
    y = sum(F.avg_pool2d(x, k, stride=2, padding=k // 2, count_include_pad=False) for k in sizes)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def assert_near(found, expected, tolerance=1e-6):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance


@layouts
@pytest.mark.parametrize(
    ("dtype", "sizes"), [*((F32, sizes) for sizes in PYRAMIDS), (F16, (3, 5)), (BF16, (3, 5))]
)
def test_makes_at_most_twice_the_error_of_the_pools(layout, dtype, sizes):
    x, dy = maps((1, 8, 13, 16), dtype, layout)
    found, exact = ours(x, dy, sizes), pools(x.double(), dy.double(), sizes)
    assert all(each.dtype == dtype for each in found)
    assert found[1].stride() == x.stride()
    for a, b, truth in zip(found, pools(x, dy, sizes), exact, strict=True):
        assert (a.double() - truth).norm() <= 2 * (b.double() - truth).norm()


@layouts
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1), (2, 2, 1, 8), (1, 3, 20, 2), (1, 40, 3, 3), (1, 3, 5, 18)], ids=str
)
def test_maps_of_any_shape(layout, size):
    x, dy = maps(size, F32, layout)
    assert_near(ours(x, dy, (3, 5, 7)), pools(x.double(), dy.double(), (3, 5, 7)))


@pytest.fixture
def many_programs(monkeypatch):
    """Several in each direction, the last not full."""
    monkeypatch.setattr(gpu, "THREADS", 32)


@layouts
def test_many_programs_make_no_difference(monkeypatch, many_programs, layout):
    x, dy = maps((1, 18, 11, 19), F32, layout)
    grid, _ = gpu._launch(x, dy, (3,), 16)
    assert min(grid) > 1
    found = ours(x, dy, (3,))
    assert_near(found, pools(x.double(), dy.double(), (3,)))
    forward = type(interpreter_builder).set_grid_idx

    def backward(self, *place):
        forward(self, *(size - 1 - i for size, i in zip(self.grid_dim, place, strict=True)))

    monkeypatch.setattr(type(interpreter_builder), "set_grid_idx", backward)
    assert all(map(torch.equal, ours(x, dy, (3,)), found))


@layouts
def test_any_strides(layout):
    x, dy = maps(layout=layout)
    expected = ours(x, dy, (3,))
    gaps = torch.cat((x, x), 1)[:, :4], torch.cat((dy, dy), 3)[:, :, :, :4]
    turned = x.mT.contiguous().mT, dy.mT.contiguous().mT
    for strided in (gaps, turned):
        assert all(map(torch.equal, ours(*strided, (3,)), expected))
    one = dy[:1, :1, :1, :1].expand_as(dy)
    assert torch.equal(sum_of_pools_backward(one, x, (3,)), sum_of_pools_backward(one.contiguous(), x, (3,)))


def test_offsets_of_large_maps_are_right(monkeypatch, many_programs):
    """Those of 64 bits, on a small map."""
    x, dy = maps()
    expected, launch = ours(x, dy, (3,)), gpu._launch

    def large(*args):
        grid, constants = launch(*args)
        return grid, constants | {"LARGE": True}

    monkeypatch.setattr(gpu, "_launch", large)
    assert all(map(torch.equal, ours(x, dy, (3,)), expected))


def test_the_gradient_does_not_depend_on_the_values_of_the_input():
    x, dy = maps()
    found = sum_of_pools_backward(dy, torch.full_like(x, float("nan")), (3, 5))
    assert torch.equal(found, sum_of_pools_backward(dy, x, (3, 5)))


def test_a_nan_reaches_its_own_windows_alone():
    x, dy = maps((1, 1, 33, 31))
    x[0, 0, 16, 15] = dy[0, 0, 4, 5] = float("nan")
    for found, expected in zip(ours(x, dy, (3,)), pools(x, dy, (3,)), strict=True):
        assert torch.equal(found.isnan(), expected.isnan())


@layouts
@pytest.mark.parametrize("end", [True, False])
def test_nothing_outside_of_the_arguments_is_touched(layout, end):
    x, dy = (guarded(t, end) for t in maps(layout=layout))
    assert survives(lambda: ours(x, dy, (3, 5, 7)))


def test_autograd_goes_through_and_twice():
    x, dy = maps()
    x.requires_grad_()
    dy.requires_grad_()
    dx = torch.autograd.grad(sum_of_pools(x, (3, 5)), x, dy, create_graph=True)[0]
    assert_near([dx.detach()], [pools(x.double(), dy.double(), (3, 5))[1]])
    v = torch.randn_like(dx)
    assert_near(torch.autograd.grad(dx, dy, v), [pools(v, dy, (3, 5))[0]])


def test_operations_are_registered_as_torch_wants_them():
    x, dy = maps((1, 2, 5, 4))
    torch.library.opcheck(gpu._sum_of_pools, (x.requires_grad_(), [3]))
    torch.library.opcheck(gpu._sum_of_pools_backward, (dy.requires_grad_(), x.detach(), [3, 5]))


def test_the_example_runs():
    x, sizes = op.example_inputs(torch.device("cpu"), F32)
    torch.testing.assert_close(sum_of_pools(x, sizes), op.reference(x, sizes))
