"""What a module keeps besides its parameters: buffers, modes, parametrizations, names."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from revseg import AdditiveCoupling, InversionError, OneSidedCoupling, ReversibleSequence
from revseg.couplings import COUPLINGS
from tests.helpers import (
    all_couplings,
    assert_same_result,
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    run_step,
    small_input,
    small_sequence,
    twin,
)


def sequence_of(make, **options):
    """An additive and a one-sided block of functions of four channels, always the same."""
    torch.manual_seed(0)
    return ReversibleSequence(AdditiveCoupling(make(), make()), OneSidedCoupling(make()), **options).double()


def conv_and(*layers):
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), *layers)


def train(net, steps=3):
    """A few steps of SGD on different inputs; the results of the last."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for seed in range(steps):
        result = run_step(net, small_input(seed=seed))
        optimizer.step()
    return result


@pytest.mark.parametrize("options", [{}, {"keep": 1}, {"per_block": True}], ids=str)
@pytest.mark.parametrize("coupling", COUPLINGS.values(), ids=COUPLINGS)
def test_batch_norm_counts_each_batch_once(coupling, options):
    """61: not again in the second run; three steps are three batches."""
    ours = small_sequence(coupling, **options)
    plain = twin(ours)
    assert_same_result(train(ours), train(plain))
    counts = [int(b) for name, b in ours.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert set(counts) == {3}


def test_batch_norm_counts_once_however_often_the_graph_is_used():
    """61: a second backward pass runs the functions a third time."""
    ours = all_couplings()
    loss = default_loss(ours(small_input()))
    before = copy.deepcopy(dict(ours.named_buffers()))
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(dict(ours.named_buffers()), before, rtol=0, atol=0)


class Centred(nn.Module):
    """Takes off the running mean as it stood before the batch, which batch norm then moves."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, 1, 1))
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x):
        mean = self.mean.clone()[:, None, None]
        version = self.mean._version
        y = F.batch_norm(x, self.mean, self.var, training=True, momentum=0.5)
        assert self.mean._version == version  # what this test is about
        return self.weight * (y - mean) * (x - mean)


@pytest.mark.parametrize("channels", [4, 10000], ids=["small", "large"])  # large ones are kept another way
def test_running_statistics_are_those_before_the_run_though_no_version_tells(channels):
    """62: batch norm writes them without raising their version."""
    ours = ReversibleSequence(AdditiveCoupling(Centred(channels), Centred(channels))).double()
    assert_same_step(ours, twin(ours), small_input(2, 2 * channels, 2, 1))


NORMS = {
    "momentum None": lambda: nn.BatchNorm2d(4, momentum=None),
    "momentum 0": lambda: nn.BatchNorm2d(4, momentum=0.0),
    "momentum 1": lambda: nn.BatchNorm2d(4, momentum=1.0),
    "no running statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "not affine": lambda: nn.BatchNorm2d(4, affine=False),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "layer norm": lambda: nn.LayerNorm([4, 6, 5]),
    "instance norm": lambda: nn.InstanceNorm2d(4),
    "instance norm that tracks": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "local response": lambda: nn.LocalResponseNorm(3),
    "rms norm": lambda: nn.RMSNorm([4, 6, 5]),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_every_kind_of_norm_gives_plain_gradients_and_buffers(norm, training):
    """63, 64: several steps, then one in the mode in question."""
    ours = sequence_of(lambda: conv_and(norm(), nn.PReLU()))
    plain = twin(ours)
    assert_same_result(train(ours), train(plain))
    assert_same_step(ours.train(training), plain.train(training), small_input())


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_run_without_gradients_in_training_mode_counts_as_in_plain(norm):
    """63: no_grad takes the plain path, which moves running statistics, too."""
    ours = sequence_of(lambda: conv_and(norm(), nn.PReLU()))
    plain = twin(ours)
    for net in (ours, plain):
        with torch.no_grad():
            net(small_input(seed=5))
    assert_same_step(ours, plain, small_input())


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
    with parametrize.cached(), pytest.raises(RuntimeError, match="cached"):
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


def lazy():
    return nn.Sequential(
        nn.LazyConv2d(4, 3, padding=1), nn.LazyBatchNorm2d(), nn.PReLU(), nn.LazyConv2d(4, 1)
    )


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("options", [{}, {"keep": 2}, {"per_block": True}], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("wanted", [True, False], ids=["input wanted", "input not wanted"])
def test_lazy_modules_take_shape_in_the_first_run(training, wanted, options):
    """75: a first step right away, without a dry run; parameters and buffers appear in it."""
    ours, plain = (
        sequence_of(lazy, save_activations=plain, **options).train(training) for plain in (False, True)
    )
    x = small_input(requires_grad=wanted)
    assert_same_step(ours, plain, x)
    assert_same_step(ours, plain, x)
    assert not any(nn.parameter.is_lazy(t) for t in ours.state_dict().values())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_second_run_is_in_the_mode_of_the_first(training):
    """76: eval() or train() between forward and backward changes nothing and is not undone."""
    ours = sequence_of(lambda: conv_and(nn.BatchNorm2d(4), nn.Dropout(0.3)))
    plain = twin(ours)
    gradients = []
    for net in (ours, plain):
        net.train(training)
        torch.manual_seed(1)
        loss = default_loss(net(small_input()))
        net.train(not training)
        net[0].f[1].train(training)  # one in the other mode
        modes = [module.training for module in net.modules()]
        loss.backward()
        assert [module.training for module in net.modules()] == modes
        gradients.append(gradients_of(net))
    assert gradient_error(*gradients) <= 1e-9
    torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()))


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


@pytest.mark.parametrize("options", [{}, {"keep": 2}, {"per_block": True}, {"check": None}], ids=str)
def test_state_dicts_do_not_depend_on_the_memory_mode(options):
    """80: the same names and values, loaded both ways, before and after a step."""
    ours, plain = all_couplings(**options), all_couplings(save_activations=True)
    for _ in range(2):
        assert list(ours.state_dict()) == list(plain.state_dict())
        run_step(plain, small_input(seed=1))
        plain.load_state_dict(ours.state_dict(), strict=True)
        assert_same_step(ours, plain, small_input())
        run_step(ours, small_input(seed=2))
        ours.load_state_dict(plain.state_dict(), strict=True)
        assert_same_step(ours, plain, small_input(seed=3))
