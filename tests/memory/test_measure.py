"""Tests of `revseg.memory.measure`: against sums done by hand, and against themselves."""

import gc
import threading

import pytest
import torch
from torch import nn
from torch._C._autograd import _profiler_enabled
from torch.autograd import profiler
from torch.utils.checkpoint import checkpoint

from revseg.memory import peak_bytes, saved_bytes


def block(size: int) -> torch.Tensor:
    """`size` bytes that nobody shares."""
    return torch.empty(size, dtype=torch.uint8)


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


def conv_net(depth: int) -> nn.Sequential:
    layers = []
    for _ in range(depth):
        layers += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.PReLU(8)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_a_conv_net_saves_three_maps_a_layer(depth):
    torch.manual_seed(0)
    net = conv_net(depth)
    x = torch.randn(2, 8, 33, 17)
    one = x.nbytes  # the map of every layer has this size
    statistics = 4 * 8 * 4  # mean and 1/std of the batch, and the two buffers
    # conv saves its input, batch norm its input, PReLU its input; the first input is x itself
    assert saved_bytes(lambda: net(x)) == depth * (3 * one + statistics)
    # forward: three new maps a layer, the last of them the output, and the statistics of the batch
    peak = peak_bytes(lambda: net(x), before=lambda: net(x))
    assert 0 <= peak - depth * 3 * one <= one + depth * statistics


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


# --- peak_bytes: errors --------------------------------------------------------------------------


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


# --- saved_bytes ---------------------------------------------------------------------------------


def test_saved_inputs_count_and_parameters_do_not():
    layer = nn.Linear(10, 20)
    x = torch.randn(5, 10)
    assert saved_bytes(lambda: layer(x)) == x.nbytes
    assert saved_bytes(lambda: layer(x.requires_grad_())) == x.nbytes  # now the weight is saved too


def test_saved_weight_without_parameter_counts():
    w = torch.randn(10, requires_grad=True)
    x = torch.randn(10, requires_grad=True)
    assert saved_bytes(lambda: x * w) == 2 * 40
    assert saved_bytes(lambda: x * nn.Parameter(w)) == 40


def test_storage_counts_once_and_in_full():
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(lambda: x * x) == 400
    assert saved_bytes(lambda: (x[:10] * x[10:20], x.exp().view(10, 10).exp())) == 3 * 400
    assert saved_bytes(lambda: x[3:5] ** 2) == 400


def test_storages_that_die_count_each():
    x = torch.randn(100, requires_grad=True)

    def fn():
        for _ in range(10):  # the heap gives out the same address again
            x.exp()

    assert saved_bytes(fn) == 10 * 400


def test_saved_bytes_frees_what_it_saw():
    x = torch.randn(1000, requires_grad=True)

    def fn():
        for _ in range(10):
            x.exp()

    assert peak_bytes(lambda: saved_bytes(fn)) == peak_bytes(fn)


def test_double_backward_through_the_count():
    x = torch.randn(10, dtype=torch.float64, requires_grad=True)
    net = nn.Linear(10, 10).double()

    def second(measure):
        outputs = []
        measure(lambda: outputs.append((net(x).exp() * x).sum()))
        (dx,) = torch.autograd.grad(outputs[0], x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *net.parameters()], allow_unused=True)

    for ours, plain in zip(second(saved_bytes), second(lambda fn: fn()), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_nothing_saved_without_grad():
    net, x = conv_net(2), torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        assert saved_bytes(lambda: net(x)) == 0


def test_checkpoint_saves_its_inputs_only():
    net, x = conv_net(3), torch.randn(2, 8, 9, 7, requires_grad=True)

    def fn():
        y = x
        for _ in range(4):
            y = checkpoint(net, y, use_reentrant=False)
        return y

    assert saved_bytes(fn) == 4 * x.nbytes


def test_meta_tensors_save_the_same():
    real, x = conv_net(3), torch.randn(2, 8, 9, 7)
    meta = conv_net(3).to("meta")
    assert saved_bytes(lambda: meta(x.to("meta"))) == saved_bytes(lambda: real(x))


def test_gradients_are_unchanged_by_the_count():
    net, x = conv_net(2).double(), torch.randn(2, 8, 9, 7, dtype=torch.float64)
    outputs = []
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    saved_bytes(lambda: outputs.append(net(x)))
    outputs[0].square().sum().backward()
    for p, grad in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=0)


def test_exception_leaves_no_hook():
    x = torch.randn(10, requires_grad=True)

    def bad():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        saved_bytes(bad)
    assert saved_bytes(lambda: x.exp()) == 40
