"""Norms, lazy modules, modes, names of the state dict."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revseg import AdditiveCoupling, ReversibleSequence
from revseg.couplings import COUPLINGS
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
    small_sequence,
    twin,
)


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
