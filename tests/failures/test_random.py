"""Random numbers: the second run of a function draws what the first drew, and nobody notices it."""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg import AdditiveCoupling, AffineCoupling, InversionError, OneSidedCoupling, ReversibleSequence
from tests.helpers import (
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    run_step,
    small_input,
    twin,
)


class Drawing(nn.Module):
    """conv, batch norm and something that draws."""

    def __init__(self, draw, out_channels=4):
        super().__init__()
        self.conv = nn.Conv2d(4, out_channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)
        self.draw = draw

    def forward(self, x):
        return self.draw(self.norm(self.conv(x)))


def drawing_sequence(draw, **options):
    torch.manual_seed(0)
    blocks = [
        AdditiveCoupling(Drawing(draw), Drawing(draw)),
        OneSidedCoupling(Drawing(draw)),
        AffineCoupling(Drawing(draw, 8), Drawing(draw, 8)),
    ]
    return ReversibleSequence(blocks, **options).double()


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


DRAWS = {
    "rrelu": nn.RReLU(0.1, 0.9),
    "gumbel": lambda x: F.gumbel_softmax(x, dim=1),
    "hard gumbel": lambda x: F.gumbel_softmax(x, hard=True, dim=1),
    "alpha dropout": nn.AlphaDropout(0.3),
    "feature alpha dropout": nn.FeatureAlphaDropout(0.3),
    "dropout2d": nn.Dropout2d(0.3),
    "fractional pooling": lambda x: F.interpolate(F.fractional_max_pool2d(x, 2, output_size=3), x.shape[2:]),
    "noise": lambda x: x + torch.randn_like(x),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "permutation": lambda x: x[:, torch.randperm(x.shape[1])],
    "multinomial": lambda x: x * torch.multinomial(torch.ones(9), 1),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_layers_that_draw_give_plain_gradients(draw):
    """71: whatever draws from torch's own random numbers."""
    ours = drawing_sequence(draw)
    assert_same_step(ours, twin(ours), small_input())


def test_rrelu_is_right_under_saved_tensor_hooks():
    """71: plain RReLU is not: its noise is packed before it is drawn (pytorch issue 193671)."""
    ours = drawing_sequence(nn.RReLU(0.1, 0.9))
    expected = run_step(twin(ours), small_input())
    x = small_input()
    ours.zero_grad()
    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = ours(x)
    default_loss(y).backward()
    error = gradient_error(gradients_of(ours, **{"input 0": x}), expected.gradients)
    assert error <= 1e-9


class Attention(nn.Module):
    """A transformer layer over the positions of a stream."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)

    def forward(self, x):
        return self.layer(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])


def test_transformer_layers_give_plain_gradients():
    """71: attention draws inside a fused kernel."""
    torch.manual_seed(0)
    ours = ReversibleSequence(*(AdditiveCoupling(Attention(), Attention()) for _ in range(2))).double()
    assert_same_step(ours, twin(ours), small_input(2, 8, 3, 2))


class StochasticDepth(nn.Module):
    """conv and batch norm, in about half of all runs."""

    def __init__(self, skip):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.skip = skip
        self.skipped = 0

    def forward(self, x):
        if torch.rand(()) < 0.5:
            self.skipped += 1
            return self.skip(x)
        return self.body(x)


@pytest.mark.parametrize(
    "skip", [torch.zeros_like, lambda x: x, lambda x: x.new_zeros(())], ids=["zeros", "identity", "scalar"]
)
def test_stochastic_depth_skips_the_same_functions_again(skip):
    """72: a skipped function leaves its parameters without a gradient, as in plain autograd."""
    ours = ReversibleSequence(
        *(AdditiveCoupling(StochasticDepth(skip), StochasticDepth(skip)) for _ in range(3))
    )
    ours = ours.double()
    plain = twin(ours)
    for seed in range(4):
        x = small_input(seed=seed)
        found, expected = run_step(ours, x, seed=seed), run_step(plain, x, seed=seed)
        missing = {name for name, gradient in expected.gradients.items() if gradient is None}
        assert missing == {name for name, gradient in found.gradients.items() if gradient is None}
        assert_same_step(ours, plain, x)
    skips = [each.skipped for each in plain.modules() if isinstance(each, StochasticDepth)]
    assert 0 < sum(skips) < 8 * len(skips)
