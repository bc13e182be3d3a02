"""Layers that draw: noise, attention, stochastic depth."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg import AdditiveCoupling, ReversibleSequence
from tests.failures.drawing import drawing_sequence
from tests.helpers import (
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    run_step,
    small_input,
    twin,
)

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
