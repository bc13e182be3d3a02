"""Mixed precision, copies, worker processes."""

import contextlib
import copy
import io
import os
import pickle
import signal
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from revseg import (
    AdditiveCoupling,
    InversionError,
    OneSidedCoupling,
    ReversibleSequence,
    Squeeze,
    is_recomputing,
)
from revseg.couplings import COUPLINGS
from tests.helpers import (
    all_couplings,
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    run_step,
    small_f,
    small_input,
    small_sequence,
    twin,
)

LOW = [torch.bfloat16, torch.float16]


def network(body=None):
    """A stem, a reversible body, a head; float64."""
    torch.manual_seed(0)
    body = body or all_couplings()
    return nn.Sequential(nn.Conv2d(3, 8, 1), body, nn.Conv2d(8, 2, 1)).double()


def image(seed=0, dtype=torch.float64):
    return small_input(2, 3, 6, 5, seed=seed, dtype=dtype, requires_grad=False)


def errors_under_autocast(net, dtype):
    """Of the gradients against float64: ours, and those of the plain twin."""
    exact = run_step(twin(net), image()).gradients
    errors = []
    for each in (net, twin(net)):
        each = copy.deepcopy(each).float()
        with torch.autocast("cpu", dtype):
            loss = default_loss(each(image(dtype=torch.float32)).float())
        loss.backward()
        found = gradients_of(each)
        assert all(g.dtype == torch.float32 for g in found.values())
        errors.append(gradient_error({**found, "input 0": None}, exact))
    return errors


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("options", [{}, {"keep": 2}, {"per_block": True}], ids=str)
@pytest.mark.parametrize("coupling", COUPLINGS.values(), ids=COUPLINGS)
def test_autocast_costs_no_more_than_in_plain(coupling, options, dtype):
    """81: functions in half precision, streams in float32, backward outside the context."""
    ours, plain = errors_under_autocast(network(small_sequence(coupling, **options)), dtype)
    assert 0 < ours <= 2 * plain


def test_couplings_that_autocast_cannot_undo_are_an_error():
    """81: sums of bfloat16 values are ties in bfloat16, and an affine block behind them tips them."""
    with contextlib.suppress(InversionError):
        ours, plain = errors_under_autocast(network(all_couplings()), torch.bfloat16)
        assert 0 < ours <= 2 * plain


@pytest.mark.parametrize(
    ("forward", "backward"),  # torch itself does not take two low precisions
    [
        (None, None),
        (None, torch.bfloat16),
        *((dtype, None) for dtype in LOW),
        *((dtype, dtype) for dtype in LOW),
    ],
    ids=str,
)
def test_autocast_around_backward_does_not_change_the_second_run(forward, backward):
    """81: it has the autocast state of the first run, and the caller's comes back."""
    net = network(small_sequence()).float()
    dtypes = {False: [], True: []}
    for f in (net[1][0].f, net[1][1].f):
        f[0].register_forward_hook(lambda m, i, y: dtypes[is_recomputing()].append(y.dtype))
    gradients = []
    for around in (backward, None):
        with torch.autocast("cpu", forward, enabled=forward is not None):
            loss = default_loss(net(image(dtype=torch.float32)).float())
        net.zero_grad()
        with torch.autocast("cpu", around, enabled=around is not None):
            state = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
            loss.backward()
            assert (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")) == state
        gradients.append(gradients_of(net))
    assert set(dtypes[True]) == set(dtypes[False]) == {forward or torch.float32}
    assert gradient_error(*gradients) <= 1e-6


def test_autocast_does_not_cut_weights_off_that_are_also_used_outside():
    """81: its cache of cast weights must not keep one that was cast without a graph."""
    f = nn.Conv2d(4, 4, 3, padding=1)
    ours = nn.Sequential(ReversibleSequence(AdditiveCoupling(f, nn.Tanh())), nn.Conv2d(8, 4, 1), f)
    found = []
    for net in (ours, twin(ours)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = default_loss(net(small_input(dtype=torch.float32)).float())
        loss.backward()
        found.append(gradients_of(net))
    assert gradient_error(*found) <= 0.02  # bfloat16


class Overflow(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * float("inf")


@pytest.mark.parametrize("bad", ["gradient", "input"])
def test_a_gradient_scaler_skips_the_step_and_goes_on(bad):
    """82: infinite gradients pass through; so do those of an infinite input."""
    results = []
    for net in (network(), twin(network())):
        net.float()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
        scales = []
        for step in range(3):
            optimizer.zero_grad()
            before = copy.deepcopy(list(net.parameters()))
            x = image(seed=step, dtype=torch.float32)
            if step == 1 and bad == "input":
                x[0, 0, 0, 0] = float("inf")
                net.eval()  # or the running statistics would be lost for ever, as in plain
            y = net(x)
            if step == 1 and bad == "gradient":
                y = Overflow.apply(y)
            scaler.scale(default_loss(y)).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            same = all(map(torch.equal, before, net.parameters()))
            assert same == (step == 1)
            net.train()
        results.append((scales, dict(net.state_dict())))
    assert results[0][0] == results[1][0] == [2.0**11, 2.0**10, 2.0**11]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-4)


def by_pickle(net):
    return pickle.loads(pickle.dumps(net))


def by_torch_save(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("options", [{}, {"keep": 2}, {"per_block": True}], ids=str)
def test_copies_are_complete_and_leave_a_live_graph_alone(duplicate, options):
    """89: before a step, between forward and backward, and after."""
    blocks = [Squeeze(), *small_sequence(channels=32)]
    ours = ReversibleSequence(*blocks, **options).double()
    plain = twin(ours)
    x = small_input(2, 8, 6, 4)
    assert_same_step(duplicate(ours), plain, x)
    plain = twin(ours)
    expected = run_step(plain, x)
    torch.manual_seed(7)
    y = ours(x)
    other = duplicate(ours)
    run_step(other, small_input(2, 8, 6, 4, seed=1))
    default_loss(y).backward()
    assert gradient_error(gradients_of(ours, **{"input 0": x}), expected.gradients) <= 1e-9
    torch.testing.assert_close(dict(ours.named_buffers()), expected.buffers)
    assert_same_step(duplicate(ours), plain, x)


class FromNetwork(Dataset):
    """Samples that a reversible network makes: features, and the gradient of one step."""

    def __init__(self, net, train):
        self.net, self.train = net, train

    def __len__(self):
        return 4

    def __getitem__(self, i):
        if not self.train:
            with torch.no_grad():
                return self.net(image(seed=i))
        self.net.zero_grad()
        default_loss(self.net(image(seed=i))).backward()
        return self.net[0].weight.grad.clone()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_data_workers_run_after_a_training_step(train):
    """91: forked processes find no lock taken and no thread missing, even in the network itself."""
    net = network(ReversibleSequence(AdditiveCoupling(small_f(), small_f()), OneSidedCoupling(small_f())))
    run_step(net, image())
    data = FromNetwork(net, train)
    found = list(DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=30))
    for i, each in enumerate(found):
        torch.testing.assert_close(each, FromNetwork(twin(net), train)[i])


class Waiting(nn.Module):
    """Stays in its run as long as it is told to."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def forward(self, x):
        self.inside.set()
        assert self.go_on.wait(30)
        return self.conv(x)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_worker_forked_while_another_thread_is_inside_a_function_can_use_it():
    """91: the child has no such thread, so nothing it holds would ever be let go."""
    waiting = Waiting()
    net = ReversibleSequence(AdditiveCoupling(waiting, nn.Tanh())).double()
    expected = run_step(net, small_input()).outputs[0]
    waiting.inside.clear()
    waiting.go_on.clear()
    thread = threading.Thread(target=net, args=(small_input(),))
    thread.start()
    assert waiting.inside.wait(30)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            waiting.go_on = threading.Event()
            waiting.go_on.set()
            status = int(not torch.equal(run_step(net, small_input()).outputs[0], expected))
        finally:
            os._exit(status)
    waiting.go_on.set()
    thread.join(30)
    deadline = time.monotonic() + 10
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked process waits for ever")
        time.sleep(0.02)
    assert os.waitstatus_to_exitcode(status[1]) == 0
