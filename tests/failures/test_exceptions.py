"""An exception passes through a function, in its first run or its second, and leaves no trace."""

import threading

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, OneSidedCoupling, ReversibleSequence, is_recomputing
from tests.helpers import (
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    run_step,
    small_input,
    twin,
)

EXCEPTIONS = [RuntimeError, KeyboardInterrupt, MemoryError]


class Fuse(nn.Module):
    """conv, batch norm, dropout; blows when told to, before, within or behind these."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.3)
        self.inner = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))
        self.place = None
        self.exception = RuntimeError

    def forward(self, x):
        self.blow("before")
        x = self.inner(self.dropout(self.norm(self.conv(x))))
        self.blow("behind")
        if self.place == "backward" and x.requires_grad:
            x.register_hook(lambda _: self.blow("backward"))
        return x

    def blow(self, place):
        if self.place == place:
            raise self.exception("blown")


def fused_sequence(**options):
    torch.manual_seed(0)
    blocks = (AdditiveCoupling(Fuse(), Fuse()), OneSidedCoupling(Fuse()), AdditiveCoupling(Fuse(), Fuse()))
    return ReversibleSequence(*blocks, **options).double()


def state_of(net):
    """All that an exception must leave as it was."""
    return {
        "tensors": {name: (id(t), t.detach().clone()) for name, t in net.state_dict(keep_vars=True).items()},
        "gradients": {name: p.grad for name, p in net.named_parameters()},
        "modes": [module.training for module in net.modules()],
        "random": torch.get_rng_state(),
        "flags": (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_cache_enabled(),
            is_recomputing(),
        ),
    }


def assert_same_state(after, before):
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"keep": 2}, {"per_block": True}], ids=str)
@pytest.mark.parametrize("exception", EXCEPTIONS)
@pytest.mark.parametrize("place", ["before", "behind", "backward"])
def test_an_exception_in_the_second_run_leaves_no_trace(place, exception, options):
    """78: buffers, parameters, modes, random state and flags are as before; no gradient of what was not undone has arrived."""
    ours = fused_sequence(**options)
    loss = default_loss(ours(small_input()))
    fuse = ours[1].f
    fuse.place, fuse.exception = place, exception
    ours.eval()  # the second run is in training mode all the same
    before = state_of(ours)
    with pytest.raises(exception, match="blown"):
        loss.backward()
    after = state_of(ours)
    for state in (before, after):  # the last block has finished, as its layers would have in plain autograd
        state["gradients"] = {k: v for k, v in state["gradients"].items() if not k.startswith("blocks.2")}
    assert_same_state(after, before)


@pytest.mark.parametrize("exception", EXCEPTIONS)
def test_after_an_exception_the_same_graph_can_be_used_again(exception):
    """78: a retry finds all that it needs."""
    ours = fused_sequence(keep=1)
    expected = run_step(twin(ours), small_input(), seed=7).gradients
    torch.manual_seed(7)
    x = small_input()
    loss = default_loss(ours(x))
    fuse = ours[1].f
    fuse.place, fuse.exception = "behind", exception
    with pytest.raises(exception, match="blown"):
        loss.backward(retain_graph=True)
    fuse.place = None
    ours.zero_grad()  # of those that had arrived, as in plain autograd
    loss.backward()
    assert gradient_error(gradients_of(ours, **{"input 0": x}), expected) <= 1e-9


@pytest.mark.parametrize("place", ["before", "behind", "backward"])
def test_after_an_exception_the_next_step_is_right(place):
    """78, 79: a new step is that of a network that has seen no exception since its forward pass."""
    ours = fused_sequence()
    plain = twin(ours)
    for net in (ours, plain):
        torch.manual_seed(7)
        loss = default_loss(net(small_input(seed=1)))
        if net is ours:
            ours[1].f.place = place
            with pytest.raises(RuntimeError, match="blown"):
                loss.backward()
            ours[1].f.place = None
    assert_same_step(ours, plain, small_input())


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("exception", EXCEPTIONS)
@pytest.mark.parametrize("place", ["before", "behind"])
def test_an_exception_in_the_first_run_leaves_what_plain_leaves(place, exception, autocast):
    """79: batch norm of the functions before has counted, the others have not."""
    ours = fused_sequence().float()
    states = []
    for net in (twin(ours), ours):
        net[1].f.place, net[1].f.exception = place, exception
        parameters = list(map(id, net.parameters()))
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(exception, match="blown"):
            net(small_input(dtype=torch.float32))
        assert list(map(id, net.parameters())) == parameters
        state = state_of(net)
        state["tensors"] = {name: tensor for name, (_, tensor) in state["tensors"].items()}
        states.append(state)
    assert_same_state(*states)
    net[1].f.place = None
    assert_same_step(ours.double(), twin(ours), small_input())


def test_an_exception_lets_go_of_the_locks():
    """78, 79: another thread can go on."""
    ours = fused_sequence()
    fuse = ours[1].f
    loss = default_loss(ours(small_input()))
    fuse.place = "behind"
    with pytest.raises(RuntimeError, match="blown"):
        loss.backward()
    with pytest.raises(RuntimeError, match="blown"):
        ours(small_input())
    fuse.place = None
    done = []
    thread = threading.Thread(target=lambda: done.append(run_step(ours, small_input())), daemon=True)
    thread.start()
    thread.join(30)
    assert done, "the other thread waits for ever"


def test_a_hook_of_the_caller_that_raises_leaves_no_trace():
    """78: the exception comes out of the backward pass behind the sequence."""
    ours = fused_sequence()
    x = small_input()
    x.register_hook(lambda _: 1 / 0)
    loss = default_loss(ours(x))
    before = state_of(ours)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    after = state_of(ours)
    del before["gradients"], after["gradients"]
    assert_same_state(after, before)
    assert_same_step(ours, twin(ours), small_input())
