"""Tests of `revseg.memory.measure`: against sums done by hand, and against themselves."""

import gc

import pytest
import torch
from torch._C._autograd import _profiler_enabled
from torch.autograd import profiler

from revseg.memory import measure, peak_bytes
from tests.memory.blocks import block
from tests.memory.nets import conv_net

# --- peak_bytes: small examples, summed by hand -------------------------------------------------


def test_peak_is_the_highest_sum_not_the_last():
    def fn():
        a = block(1000)
        b = block(3000)  # 4000
        del a  # 3000
        c = block(500)  # 3500
        del b, c
        return block(2000)

    assert peak_bytes(fn) == 4000


def test_nothing_allocated_is_zero():
    a = block(1000)
    assert peak_bytes(lambda: None) == 0
    assert peak_bytes(lambda: a.fill_(1)) == 0  # in place
    assert peak_bytes(lambda: a[10:20].view(2, 5)) == 0  # views


def test_live_before_the_start_is_not_counted():
    held = block(1 << 20)
    assert peak_bytes(lambda: held.clone()) == 1 << 20


def test_result_stays_alive_and_is_then_dropped():
    freed = []

    class Watched(torch.Tensor):
        def __del__(self):
            freed.append(_profiler_enabled())

    peak_bytes(lambda: block(64).as_subclass(Watched))
    gc.collect()
    assert freed == [False]  # after the count, and no later


def test_repeated_calls_give_the_same():
    def fn():
        a = torch.randn(1000)
        return (a * a + a).sum().item()

    figures = {peak_bytes(fn) for _ in range(5)}
    assert len(figures) == 1


def test_block_from_before_the_call_that_fn_frees_changes_nothing():
    # The allocator never saw that block: it cannot say its size. The peak is an upper bound.
    held = [block(5000)]

    def fn():
        held.clear()
        return block(3000)

    assert peak_bytes(fn) == 3000


def test_block_of_an_earlier_profile_that_fn_frees_changes_nothing():
    # The allocator keeps sizes by address for ever: the size it reports may be that of a block
    # which was freed between two profiles. The same function gave two figures.
    held = []
    peak_bytes(lambda: held.append(block(5000)))

    def fn():
        held.clear()
        return block(3000)

    assert peak_bytes(fn) == 3000


def test_stale_address_of_an_earlier_profile_does_not_count():
    size = 3 << 20
    held = []
    peak_bytes(lambda: held.append(block(size)))
    address = held.pop().data_ptr()
    reused = []
    for _ in range(200):  # small blocks until one of them sits at the old address, if the heap does that
        reused.append(block(1 << 16))
        if reused[-1].data_ptr() == address:
            break

    def fn():
        reused.clear()
        return block(1000)

    assert peak_bytes(fn) == 1000


def test_before_is_not_counted_but_its_blocks_may_be_freed():
    held = []

    def fn():
        a = block(3000)  # 3000
        held.clear()  # -2000
        b = block(2500)  # 500
        c = block(2600)  # 3100
        return a, b, c

    assert peak_bytes(fn, before=lambda: held.append(block(5000))) == 3100
    held.append(block(5000))
    assert peak_bytes(fn) == 8100


def test_before_may_be_the_function_itself():
    cache = []

    def fn():
        if not cache:
            cache.append(block(5000))
        return block(100)

    cold = peak_bytes(fn)
    cache.clear()
    warm = peak_bytes(fn, before=fn)
    assert (cold, warm) == (5100, 100)


def test_before_that_allocates_more_than_fn():
    assert peak_bytes(lambda: block(100), before=lambda: block(5000)) == 100


def test_many_blocks_against_a_model():
    torch.manual_seed(0)
    choices = torch.randint(0, 3, (500,)).tolist()
    sizes = torch.randint(1, 100_000, (500,)).tolist()

    def expected():
        live, now, peak = [], 0, 0
        for choice, size in zip(choices, sizes, strict=True):
            if choice and live:
                now -= live.pop(size % len(live)) if choice == 2 else 0
            else:
                live.append(size)
                now += size
            peak = max(peak, now)
        return peak

    def fn():
        live = []
        for choice, size in zip(choices, sizes, strict=True):
            if choice and live:
                if choice == 2:
                    live.pop(size % len(live))
            else:
                live.append(block(size))
        return live

    assert peak_bytes(fn) == expected()


def test_garbage_of_the_caller_is_collected_first():
    class Node:
        pass

    def fn():
        a = block(3000)
        gc.collect()
        return a, block(3000)

    def litter():
        node = Node()
        node.itself, node.tensor = node, block(10_000)

    figures = set()
    for _ in range(3):
        litter()
        figures.add(peak_bytes(fn))
    assert figures == {6000}


# --- peak_bytes: networks ------------------------------------------------------------------------


def test_peak_of_a_chain_of_multiplications():
    # `x * w` saves x and w, so that each of the 5 products stays until its node has run. The loss
    # is a sum, whose gradient is expanded, not stored: 1 scalar out, 1 scalar gradient.
    n = 1000
    x = torch.randn(n)
    weights = [torch.randn(n, requires_grad=True) for _ in range(5)]
    for w in weights:
        w.grad = torch.zeros(n)

    def forward():
        y = x
        for w in weights:
            y = y * w
        return y

    assert peak_bytes(forward) == 5 * 4 * n


def test_training_step_grows_with_depth_as_computed():
    def step_of(depth):
        torch.manual_seed(0)
        net, x = conv_net(depth), torch.randn(2, 8, 33, 17)
        dy = torch.ones_like(x)

        def step():
            y = net(x)
            y.backward(dy)
            return y

        return peak_bytes(step, before=step)

    one = 2 * 8 * 33 * 17 * 4
    slope = (step_of(9) - step_of(3)) / 6
    assert abs(slope - 3 * one) < 0.02 * 3 * one


def test_training_step_repeats_to_the_byte():
    torch.manual_seed(0)
    net, x = conv_net(4), torch.randn(2, 8, 33, 17)

    def step():
        net(x).sum().backward()

    assert len({peak_bytes(step, before=step) for _ in range(3)}) == 1


def test_operations_that_are_left_out_change_nothing(monkeypatch):
    net, x = conv_net(4), torch.randn(2, 8, 33, 17)

    def step():
        net(x).sum().backward()

    found = peak_bytes(step, before=step)
    monkeypatch.setattr(measure, "_BlocksAlone", profiler.profile)  # every operation of torch is an event
    assert found == peak_bytes(step, before=step)


# --- peak_bytes: errors --------------------------------------------------------------------------


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="expected a device of type cpu or cuda, got meta"):
        peak_bytes(lambda: None, device="meta")


@pytest.mark.needs_cuda
def test_peak_on_a_gpu():
    def fn():
        a = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
        b = torch.empty(3 << 20, dtype=torch.uint8, device="cuda")
        del a
        return b, torch.empty(1 << 19, dtype=torch.uint8, device="cuda")

    held = torch.empty(1 << 20, device="cuda")
    assert peak_bytes(fn, "cuda") == 4 << 20
    assert peak_bytes(fn, "cuda", before=fn) == 4 << 20
    del held
