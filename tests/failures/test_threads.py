"""90: threads. Two models; one model in four threads; a backward pass in another thread."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, OneSidedCoupling, ReversibleSequence, is_recomputing
from tests.helpers import (
    all_couplings,
    default_loss,
    gradient_error,
    gradients_of,
    run_step,
    small_f,
    small_input,
    small_sequence,
    twin,
)

TIMEOUT = 60


def in_threads(*jobs):
    """What the jobs return, each run in a thread of its own, begun together."""
    barrier = threading.Barrier(len(jobs))

    def begin(job):
        barrier.wait(TIMEOUT)
        return job()

    pool = ThreadPoolExecutor(len(jobs))
    futures = [pool.submit(begin, job) for job in jobs]
    try:
        return [future.result(TIMEOUT) for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def grouped(channels=4):
    """Without state: what one thread finds does not depend on the others."""
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(2, channels), nn.PReLU())


def grouped_sequence(**options):
    torch.manual_seed(0)
    blocks = (AdditiveCoupling(grouped(), grouped()), OneSidedCoupling(grouped()))
    return ReversibleSequence(*blocks, **options).double()


def gradients_by_grad(net, seed, parameters=None):
    """Not through `.grad`, which the threads share."""
    names, parameters = zip(*(parameters or net.named_parameters()), strict=True)
    x = small_input(seed=seed)
    found = torch.autograd.grad(default_loss(net(x)), [x, *parameters])
    return dict(zip(["input 0", *names], found, strict=True))


def test_two_models_in_two_threads_do_not_meet():
    """90: several steps each; buffers too."""
    nets = [all_couplings(), small_sequence()]
    plain = [twin(net) for net in nets]

    def steps(net):
        for seed in range(4):
            x = small_input(seed=seed)
            net.zero_grad()
            default_loss(net(x)).backward()
        return gradients_of(net, x=x)

    found = in_threads(*(lambda net=net: steps(net) for net in nets))
    for net, other, gradients in zip(nets, plain, found, strict=True):
        assert gradient_error(gradients, steps(other)) <= 1e-9
        torch.testing.assert_close(dict(net.named_buffers()), dict(other.named_buffers()))


class Dropping(nn.Module):
    """Dropout that compares the mask of its second run with that of its first."""

    def __init__(self, wrong):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.wrong = wrong
        self.masks = threading.local()

    def forward(self, x):
        mask = torch.rand(x.shape) < 0.5
        masks = self.masks.__dict__.setdefault("kept", [])
        if not is_recomputing():
            masks.append(mask)
        elif not torch.equal(masks.pop(), mask):
            self.wrong.append(threading.get_ident())
        return self.conv(x * mask)


@pytest.mark.parametrize("shared", [False, True], ids=["two models", "one model"])
def test_masks_repeat_though_another_thread_draws(shared):
    """90: all threads draw from one global random state."""
    wrong = []

    def sequence():
        return ReversibleSequence(AdditiveCoupling(Dropping(wrong), Dropping(wrong))).double()

    nets = [sequence()] * 2 if shared else [sequence(), sequence()]

    def steps(net):
        for seed in range(100):
            gradients_by_grad(net, seed)

    in_threads(*(lambda net=net: steps(net) for net in nets))
    assert not wrong


@pytest.mark.parametrize("hooks", [False, True], ids=["", "hooks"])  # with hooks parameters are swapped
@pytest.mark.parametrize("options", [{}, {"keep": 2}, {"per_block": True}], ids=str)
def test_one_model_in_four_threads_gives_each_its_own_gradients(options, hooks):
    """90: parameters, buffers and random state of one module are put back for one thread at a time."""
    net = grouped_sequence(**options)
    plain = twin(net)
    parameters = list(net.named_parameters())
    for _, p in parameters if hooks else ():
        p.register_hook(lambda g: g)

    def steps(thread):
        return [gradients_by_grad(net, 10 * thread + i, parameters) for i in range(8)]

    found = in_threads(*(lambda i=i: steps(i) for i in range(4)))
    for thread, gradients in enumerate(found):
        for i, each in enumerate(gradients):
            assert gradient_error(each, gradients_by_grad(plain, 10 * thread + i)) <= 1e-9


def test_four_threads_add_up_in_grad():
    """90: `.grad` of shared parameters is the sum."""
    net = grouped_sequence()
    plain = twin(net)
    in_threads(*(lambda i=i: default_loss(net(small_input(seed=i))).backward() for i in range(4)))
    for i in range(4):
        default_loss(plain(small_input(seed=i))).backward()
    assert gradient_error(gradients_of(net), gradients_of(plain)) <= 1e-9


@pytest.mark.parametrize("shared", ["f", "layer of f and g"])
def test_four_threads_leave_the_module_s_own_buffers_behind(shared):
    """90: each batch counts once, and no copy of a buffer takes its place."""
    torch.manual_seed(0)
    f = small_f()
    g = f if shared == "f" else nn.Sequential(nn.Conv2d(4, 4, 1), f)  # two functions with a layer in common
    net = ReversibleSequence(AdditiveCoupling(f, g)).double()
    before = {name: id(b) for name, b in net.named_buffers()}
    steps = 25

    def train(thread):
        for i in range(steps):
            gradients_by_grad(net, 100 * thread + i)

    in_threads(*(lambda i=i: train(i) for i in range(4)))
    assert {name: id(b) for name, b in net.named_buffers()} == before
    assert int(f[1].num_batches_tracked) == 2 * 4 * steps


def test_validation_in_another_thread_sees_the_module_as_it_is():
    """90: no gradients, so no second run; but the training thread has put old buffers in meanwhile."""
    net = all_couplings().eval()
    x = small_input(requires_grad=False)
    expected = net(x).detach()
    stop = threading.Event()

    def train():
        try:
            for seed in range(40):
                gradients_by_grad(net, seed)
        finally:
            stop.set()

    def validate():
        worst = 0.0
        while not stop.is_set():
            with torch.no_grad():
                worst = max(worst, float((net(x) - expected).abs().max()))
        return worst

    _, worst = in_threads(train, validate)
    assert worst <= 1e-12


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("options", [{}, {"keep": 2}, {"per_block": True}], ids=str)
def test_a_backward_pass_in_another_thread_is_the_same(options, autocast):
    """90: autocast and grad mode belong to threads; those of the forward pass count."""
    net = small_sequence(**options).float()
    found = []
    for elsewhere in (True, False):
        x = small_input(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = default_loss(net(x).float())
        net.zero_grad()
        if elsewhere:
            with torch.no_grad():
                in_threads(loss.backward)
        else:
            loss.backward()
        found.append(gradients_of(net, x=x))
        assert not is_recomputing()
    assert gradient_error(*found) == 0


def test_reversible_functions_inside_functions_do_not_wait_for_each_other():
    """90: nested sequences take two locks, in one order."""
    torch.manual_seed(0)
    inner = ReversibleSequence(AdditiveCoupling(grouped(2), grouped(2)))
    net = ReversibleSequence(AdditiveCoupling(inner, grouped()), OneSidedCoupling(inner)).double()
    expected = [run_step(twin(net), small_input(seed=i)).gradients for i in range(4)]
    found = in_threads(*(lambda i=i: [gradients_by_grad(net, i) for _ in range(5)] for i in range(4)))
    for each, gradients in zip(found, expected, strict=True):
        for again in each:
            assert gradient_error(again, gradients) <= 1e-9
