"""`peak_bytes` where threads allocate, and where the function fails or profiles itself."""

import threading

import pytest
import torch
from torch._C._autograd import _profiler_enabled
from torch.autograd import profiler

from revseg.memory import peak_bytes
from tests.memory.blocks import block

SEEN = []  # threads


class _Deep(torch.autograd.Function):
    """A backward within a backward, `depth` times: autograd takes a new thread for every 60."""

    @staticmethod
    def forward(ctx, x, depth):
        ctx.depth = depth
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        if ctx.depth == 0:
            SEEN.append(threading.get_native_id())
            block(1 << 20)
            return dx, None
        with torch.enable_grad():
            _Deep.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).backward()
        return dx, None


def test_threads_of_autograd_are_counted():
    SEEN.clear()
    x = torch.ones(1, requires_grad=True)
    peak = peak_bytes(lambda: _Deep.apply(x, 100).backward())
    assert SEEN[0] != threading.get_native_id()  # else this test tests nothing
    assert 1 << 20 <= peak < (1 << 20) + 10_000


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_inside_an_operator_change_nothing(threads):
    a = torch.randn(1 << 18)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert peak_bytes(lambda: a.exp()) == a.nbytes
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("where", ["fn", "before"])
def test_exceptions_pass_through_and_leave_the_profiler_off(where):
    def bad():
        block(1000)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        peak_bytes(bad if where == "fn" else lambda: None, before=bad if where == "before" else None)
    assert not _profiler_enabled()
    assert peak_bytes(lambda: block(1000)) == 1000


def test_running_profiler_is_refused():
    with profiler.profile(), pytest.raises(RuntimeError, match="expected no running profiler"):
        peak_bytes(lambda: block(1000))
    assert peak_bytes(lambda: block(1000)) == 1000


def test_function_that_runs_a_profiler_is_refused():
    def fn():
        with profiler.profile():
            block(1000)

    with pytest.raises(RuntimeError, match="expected a function that runs no profiler, got one that does"):
        peak_bytes(fn)
    with pytest.raises(RuntimeError, match="profiler"):
        peak_bytes(lambda: peak_bytes(fn))
    assert not _profiler_enabled()
    assert peak_bytes(lambda: block(1000)) == 1000
