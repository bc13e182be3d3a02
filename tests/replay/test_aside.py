"""A loss on what a function puts aside in a run without a graph: refused, where plain autograd would differentiate it."""

import copy

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, Recompute, ReversibleSequence
from revseg.testing import plain_twin


class Attribute(nn.Module):
    """A gate whose balance stands as an attribute, for a loss of its own."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(4, 4, 1)
        self.reset()

    def reset(self):
        self.balance = None

    def forward(self, x):
        gate = self.gate(x).sigmoid()
        self.put(gate.mean().square())
        return x * gate

    def put(self, balance):
        self.balance = balance

    def found(self):
        return self.balance


class InAList(Attribute):
    def reset(self):
        self.balances = []

    def put(self, balance):
        self.balances.append(balance)

    def found(self):
        return self.balances[0]


class InADictionary(Attribute):
    def reset(self):
        self.balances = {}

    def put(self, balance):
        self.balances["gate"] = balance

    def found(self):
        return self.balances["gate"]


class Below(Attribute):
    """The attribute of a module in the function."""

    def reset(self):
        self.holder = nn.Module()
        self.holder.balance = None

    def put(self, balance):
        self.holder.balance = balance

    def found(self):
        return self.holder.balance


class Lazy(nn.Module):
    """A function that makes a constant in its first run."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 1, 1))
        self.positions = None

    def forward(self, x):
        if self.positions is None:
            self.positions = torch.arange(x.shape[-1], dtype=x.dtype)
        return x * self.weight + self.positions


KINDS = [Attribute, InAList, InADictionary, Below]
WAYS = {
    "sequence": lambda f: ReversibleSequence(AdditiveCoupling(f, nn.Conv2d(4, 4, 1))),
    "kept graph": lambda f: ReversibleSequence(AdditiveCoupling(nn.Conv2d(4, 4, 1), f), keep=1),
    "Recompute": lambda f: Recompute(nn.Sequential(nn.Conv2d(8, 4, 1), f)),
    "nested": lambda f: Recompute(nn.Sequential(nn.Conv2d(8, 4, 1), Recompute(f))),
}


def images():
    torch.manual_seed(0)
    return torch.randn(2, 8, 5, 6, requires_grad=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_loss_on_it_is_refused(way, kind):
    f = kind()
    net = WAYS[way](f)
    y = net(images())
    with pytest.raises(RuntimeError, match=r"balance.* was put aside by a function that runs again"):
        (y.mean() + f.found()).backward()


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_twin_differentiates_it(kind):
    f = kind()
    net = plain_twin(WAYS["sequence"](f))
    f = next(module for module in net.modules() if isinstance(module, kind))
    (net(images()).mean() + 10 * f.found()).backward()
    assert f.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_it_can_be_read_and_used_as_a_constant(way, kind):
    f = kind()
    net = WAYS[way](f)
    twin = copy.deepcopy(net)
    g = next(module for module in twin.modules() if isinstance(module, kind))
    expected = twin(images())
    (expected.mean() * g.found().item()).backward()
    y = net(images())
    (y.mean() * f.found().detach()).backward()
    assert torch.equal(y, expected)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_leaves_no_mark(way):
    """A constant that the first run makes, such as positions, is an ordinary tensor after the step."""

    f = Lazy()
    net = WAYS[way](f)
    net(images()).mean().backward()
    assert not f.positions.requires_grad
    kept = f.positions
    net(images()).mean().backward()
    assert f.positions is kept
    copy.deepcopy(net)


def test_counters_and_older_tensors_are_let_be():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.mask = torch.ones(4, 1, 1)
            self.largest = None

        def forward(self, x):
            self.largest = x.flatten().argmax()
            return self.conv(x) * self.mask

    f = Counting()
    mask = f.mask
    net = WAYS["sequence"](f)
    y = net(images())
    assert f.mask is mask
    assert not f.largest.requires_grad
    y.mean().backward()


def test_evaluation_marks_nothing():
    f = Attribute()
    net = WAYS["sequence"](f).eval()
    with torch.no_grad():
        net(images())
    assert not f.balance.requires_grad


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_function_used_twice_finds_its_constants(keep):
    f = Lazy()
    net = ReversibleSequence(
        AdditiveCoupling(f, nn.Conv2d(4, 4, 1)), AdditiveCoupling(f, nn.Conv2d(4, 4, 1)), keep=keep
    )
    twin = plain_twin(net)
    expected, found = images(), images()
    twin(expected).square().mean().backward()
    net(found).square().mean().backward()
    torch.testing.assert_close(found.grad, expected.grad)
    assert not f.positions.requires_grad
