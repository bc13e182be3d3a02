"""Random numbers: the second run of a function draws what the first drew, and nobody notices it."""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg import AdditiveCoupling, InversionError, OneSidedCoupling, ReversibleSequence
from tests.failures.drawing import Drawing, drawing_sequence
from tests.helpers import (
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    run_step,
    small_input,
    twin,
)


def half_dropped(x):
    return F.dropout(x, 0.5, training=True)


@pytest.mark.parametrize("options", [{}, {"keep": 2}, {"per_block": True}], ids=str)
def test_dropout_of_both_functions_of_a_block_keeps_its_masks(options):
    """66: one random state per call of a function; the inversion runs g before f."""
    ours = drawing_sequence(nn.Dropout(0.5), **options)
    assert_same_step(ours, twin(ours), small_input())


def test_a_function_used_twice_draws_twice():
    """66: the states belong to the calls, not to the function."""
    f = Drawing(nn.Dropout2d(0.5))
    ours = ReversibleSequence(AdditiveCoupling(f, f), OneSidedCoupling(f)).double()
    assert_same_step(ours, twin(ours), small_input())


def test_the_global_random_state_moves_as_in_plain_autograd():
    """67: forward draws what plain draws, backward nothing, whatever was drawn between them."""
    ours = drawing_sequence(half_dropped)
    states = []
    for net in (ours, twin(ours)):
        torch.manual_seed(3)
        y = net(small_input())
        after_forward = torch.get_rng_state()
        torch.rand(5)
        before_backward = torch.get_rng_state()
        y.sum().backward()
        assert torch.equal(torch.get_rng_state(), before_backward)
        states.append(after_forward)
    assert torch.equal(*states)


def test_the_global_random_state_survives_an_exception_in_the_second_run():
    """67: the replayed state does not stay behind."""
    armed = False

    def draw(x):
        x = half_dropped(x)
        if armed:
            raise RuntimeError("stop")
        return x

    y = drawing_sequence(draw)(small_input())
    armed = True
    torch.manual_seed(11)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"):
        y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_reseeding_between_forward_and_backward_changes_nothing():
    """68: the masks come from the forward pass; so do those of a second backward pass."""
    ours = drawing_sequence(half_dropped)
    expected = run_step(twin(ours), small_input(), seed=3).gradients
    x = small_input()
    torch.manual_seed(3)
    loss = default_loss(ours(x))
    for seed in (99, 100):
        ours.zero_grad()
        x.grad = None
        torch.manual_seed(seed)
        loss.backward(retain_graph=True)
        assert gradient_error(gradients_of(ours, **{"input 0": x}), expected) <= 1e-9


@pytest.mark.needs_cuda
def test_dropout_on_the_gpu_keeps_its_masks_and_its_random_state():
    """69: each device has a random state of its own, and a function may draw from two of them."""

    def draw(x):
        return half_dropped(x) * torch.rand(()).to(x.device)

    ours = drawing_sequence(draw).cuda()
    plain = twin(ours)
    x = small_input().detach().cuda().requires_grad_()
    assert_same_step(ours, plain, x)
    states = []
    for net in (ours, plain):
        torch.manual_seed(5)
        net(x).sum().backward()
        states.append(torch.cuda.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.needs_cuda
def test_a_function_may_draw_on_the_gpu_for_a_stream_on_the_cpu():
    """69: the state of a device that no stream is on."""
    torch.cuda.init()

    def draw(x):
        return x * torch.rand(x.shape, device="cuda", dtype=x.dtype).cpu()

    ours = drawing_sequence(draw)
    assert_same_step(ours, twin(ours), small_input())


def test_a_function_that_is_the_first_to_use_the_gpu_is_refused(monkeypatch):
    """69: whether it drew, and from which state, nobody can tell."""
    monkeypatch.setattr("revseg.replay.call.gpu_is_awake", iter([False, True]).__next__)
    with pytest.raises(RuntimeError, match=r"call torch\.cuda\.init\(\) before"):
        drawing_sequence(half_dropped)(small_input())


def private_generator():
    generator = torch.Generator().manual_seed(0)
    return lambda x: x * torch.rand(x.shape, generator=generator, dtype=x.dtype)


def counter():
    count = itertools.count(1)
    return lambda x: x * next(count)


def hidden_tensor():
    state = torch.zeros((), dtype=torch.float64)
    return lambda x: x * state.add_(1)


HIDDEN = {
    "python": lambda: lambda x: x * random.random(),
    "numpy": lambda: lambda x: x * np.random.default_rng().random(),
    "private generator": private_generator,
    "counter": counter,
    "tensor that is no buffer": hidden_tensor,
}


@pytest.mark.parametrize("make", HIDDEN.values(), ids=HIDDEN)
def test_hidden_state_is_an_error(make):
    """70: what cannot be put back is noticed: the inversion misses its beginning."""
    ours = drawing_sequence(make())
    x = small_input()
    loss = ours(x).square().mean()
    with pytest.raises(InversionError, match="hidden state"):
        loss.backward()
    assert x.grad is None


@pytest.mark.parametrize("make", HIDDEN.values(), ids=HIDDEN)
def test_hidden_state_in_one_function_of_the_last_block_is_an_error(make):
    """70: also where only one function in the chain has it."""
    ours = drawing_sequence(torch.tanh)
    ours[-1].g.draw = make()
    loss = ours(small_input()).square().mean()
    with pytest.raises(InversionError, match="hidden state"):
        loss.backward()


def test_hidden_state_is_a_warning_if_asked():
    """70: check="warn" names the same thing and goes on."""
    ours = drawing_sequence(counter(), check="warn")
    loss = ours(small_input()).square().mean()
    with pytest.warns(RuntimeWarning, match="hidden state"):
        loss.backward()


def test_hidden_state_of_functions_that_keep_their_graph_does_no_harm():
    """70: nothing runs again, so nothing differs."""
    ours = drawing_sequence(torch.tanh, keep=6)
    plain = twin(ours)
    ours[0].f.draw, plain[0].f.draw = counter(), counter()
    assert_same_step(ours, plain, small_input())
