"""Weights that are computed, buffers that functions change, whoever writes to them meanwhile."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from revseg import AdditiveCoupling, InversionError, ReversibleSequence
from tests.failures.small_training import conv_and, sequence_of, train
from tests.helpers import (
    all_couplings,
    assert_same_result,
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    run_step,
    small_input,
    twin,
)


def spectral(layer):
    return nn.utils.parametrizations.spectral_norm(layer)


PARAMETRIZED = {
    "spectral norm": lambda: spectral(nn.Conv2d(4, 4, 3, padding=1)),
    "spectral norm, old": lambda: nn.utils.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
    "weight norm, old": lambda: nn.utils.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(5, 5)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layer", PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_computed_weights_are_computed_as_in_the_first_run(layer, training):
    """73: a power iteration is made once a step, and repeated from where it began."""
    ours, plain = (
        sequence_of(lambda: nn.Sequential(layer(), nn.PReLU()), save_activations=plain)
        for plain in (False, True)
    )
    assert_same_result(train(ours), train(plain))
    assert_same_step(ours.train(training), plain.train(training), small_input())


@pytest.mark.parametrize("options", [{}, {"keep": 3}, {"per_block": True}], ids=str)
def test_a_cache_of_computed_weights_is_an_error(options):
    """73: `parametrize.cached` would keep a weight that was computed without a graph."""
    ours = sequence_of(lambda: spectral(nn.Conv2d(4, 4, 3, padding=1)), **options)
    plain = twin(ours)
    with (
        parametrize.cached(),
        pytest.raises(
            RuntimeError, match=r"parametrize\.cached\(\) keeps weights made here without gradients"
        ),
    ):
        ours(small_input())
    ours.load_state_dict(plain.state_dict())
    assert_same_step(ours, plain, small_input())


@pytest.mark.parametrize("options", [{}, {"keep": 1}, {"per_block": True}], ids=str)
def test_a_cache_of_computed_weights_around_backward_loses_no_gradient(options):
    """73: there the cache must not see the second run, or a weight used twice has the first one's graph."""
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
    ours = sequence_of(lambda: nn.Sequential(layer, nn.PReLU()), **options)
    expected = run_step(twin(ours), small_input()).gradients
    x = small_input()
    loss = default_loss(ours(x))
    try:
        with parametrize.cached():
            loss.backward()
    except RuntimeError as error:
        if "cached" not in str(error):
            raise
    else:
        assert gradient_error(gradients_of(ours, **{"input 0": x}), expected) <= 1e-9


class Memory(nn.Module):
    """Output depends on buffers that the run changes in each of the ways there are."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ema", torch.zeros(4, 1, 1))
        self.register_buffer("last", None)
        self.register_buffer("hidden", torch.ones(()), persistent=False)

    def forward(self, x):
        y = self.conv(x) * (1 + self.ema) * self.hidden.clone() / (1 + self.count)
        if self.last is not None:
            y = y + self.last
        self.count += 1
        self.hidden.mul_(0.9)
        self.ema = 0.9 * self.ema + 0.1 * x.detach().mean((0, 2, 3))[:, None, None]
        self.last = x.detach().mean()
        return y


def test_buffers_that_functions_change_or_replace_are_as_before_the_run():
    """74: counters, moving averages of activations, a buffer that was None."""
    ours = sequence_of(Memory)
    plain = twin(ours)
    assert_same_result(train(ours), train(plain))
    assert int(ours[0].f.count) == 3


def test_buffers_are_the_same_objects_after_a_backward_pass():
    """74: whoever holds a buffer (an optimizer, an average of weights) still holds the module's."""
    ours = all_couplings()
    loss = default_loss(ours(small_input()))
    before = {name: (id(b), b.data_ptr()) for name, b in ours.named_buffers()}
    loss.backward()
    assert {name: (id(b), b.data_ptr()) for name, b in ours.named_buffers()} == before


class LateBuffer(nn.Module):
    """Registers its buffer in its first run."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        if not hasattr(self, "scale"):
            self.register_buffer("scale", x.detach().abs().mean())
            return self.conv(x)
        return self.conv(x) / self.scale


def test_a_buffer_that_the_first_run_registers_is_not_there_in_the_second():
    """74: data-dependent initialisation, as in ActNorm."""
    ours = sequence_of(LateBuffer)
    plain = twin(ours)
    assert_same_step(ours, plain, small_input())
    assert_same_step(ours, plain, small_input(seed=1))


class ActNorm(nn.Module):
    """Takes bias and scale from its first batch, as flows do."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4, 1, 1))
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x):
        if not self.ready:
            with torch.no_grad():
                self.bias.copy_(-x.mean((0, 2, 3))[:, None, None])
                self.scale.copy_(1 / x.std((0, 2, 3))[:, None, None])
            self.ready.fill_(True)
        return (x + self.bias) * self.scale


def test_parameters_that_the_first_run_sets_are_as_in_plain():
    """74: data-dependent initialisation of parameters, told by a buffer."""
    ours = sequence_of(lambda: nn.Sequential(ActNorm(), nn.Tanh()))
    plain = twin(ours)
    assert_same_result(train(ours), train(plain))
    for p, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-9)


class Remembering(nn.Module):
    """Keeps a tensor as an ordinary attribute, which nobody can know of."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.last = 0.0

    def forward(self, x):
        y = self.conv(x) + self.last
        self.last = x.detach().mean() + 1
        return y


def test_state_in_an_ordinary_attribute_is_an_error():
    """74: it should have been a buffer."""
    loss = default_loss(sequence_of(Remembering)(small_input()))
    with pytest.raises(InversionError, match="hidden state"):
        loss.backward()


@pytest.mark.parametrize("between", ["eval", "no_grad", "train"])
def test_another_run_between_forward_and_backward_changes_nothing(between):
    """77: a validation pass, another micro-batch."""
    ours = sequence_of(lambda: conv_and(Memory(), nn.BatchNorm2d(4), nn.Dropout(0.3)))
    plain = twin(ours)
    gradients = []
    for net in (ours, plain):
        torch.manual_seed(1)
        loss = default_loss(net(small_input()))
        if between == "eval":
            net.eval()(small_input(seed=1))
            net.train()
        elif between == "no_grad":
            with torch.no_grad():
                net(small_input(seed=1))
        else:
            net(small_input(seed=1))
        loss.backward()
        gradients.append(gradients_of(net))
    assert gradient_error(*gradients) <= 1e-9
    torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_buffers_written_between_forward_and_backward_change_nothing(training):
    """77: the forward pass has its own copies (plain autograd refuses this)."""
    ours = sequence_of(lambda: conv_and(Memory(), nn.BatchNorm2d(4))).train(training)
    expected = run_step(twin(ours), small_input()).gradients
    x = small_input()
    loss = default_loss(ours(x))
    for buffer in ours.buffers():
        buffer.zero_()
    loss.backward()
    assert gradient_error(gradients_of(ours, **{"input 0": x}), expected) <= 1e-9
    assert not any(buffer.any() for buffer in ours.buffers())


def test_large_buffers_written_between_forward_and_backward_are_an_error():
    """77: those that the function only reads are not copied."""
    ours = ReversibleSequence(AdditiveCoupling(nn.BatchNorm1d(10000), nn.Identity())).double().eval()
    loss = default_loss(ours(small_input(2, 20000)))
    ours[0].f.running_mean.fill_(3)
    with pytest.raises((InversionError, RuntimeError)):
        loss.backward()
