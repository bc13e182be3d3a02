"""Callables that are no modules, and the modules that they reach."""

from functools import partial

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, ReversibleSequence
from revseg.replay.reach import modules_of
from tests.helpers import assert_same_step, small_input, twin


def norm():
    return nn.BatchNorm2d(4, affine=False)


class Net(nn.Module):
    """A part of a network with a method for a function."""

    def __init__(self):
        super().__init__()
        self.bn = norm()
        self.body = ReversibleSequence(AdditiveCoupling(self.helper, nn.Conv2d(4, 4, 1)))

    def helper(self, x):
        return self.inner(x)

    def inner(self, x):
        return self.bn(x).tanh()

    def forward(self, x):
        return self.body(x)


class Holder:
    """No module, but holds one; can be called."""

    def __init__(self, module):
        self.parts = {"first": [module]}

    def __call__(self, x):
        return self.parts["first"][0](x)

    def method(self, x):
        return self(x)


def closure(module):
    def inner(x):
        return module(x)

    return lambda x: inner(x).tanh()


def default(module):
    return lambda x, m=module: m(x)


def applied(module, x, scale=1.0):
    return module(x) * scale


GLOBAL = norm()


def by_name(x):
    return GLOBAL(x)


CALLABLES = {
    "closure": closure,
    "default": default,
    "partial": lambda m: partial(applied, m, scale=0.5),
    "partial of a keyword": lambda m: partial(lambda x, m: m(x), m=m),
    "object": Holder,
    "method of an object": lambda m: Holder(m).method,
    "method of a module": lambda m: m.forward,
}


@pytest.mark.parametrize("make", CALLABLES.values(), ids=CALLABLES)
def test_a_batch_counts_once(make):
    bn = norm()
    torch.manual_seed(0)
    net = ReversibleSequence(AdditiveCoupling(make(bn), nn.Conv2d(4, 4, 1))).double()
    bn.double()
    net(small_input()).sum().backward()
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize("make", CALLABLES.values(), ids=CALLABLES)
def test_parameters_get_their_gradients(make):
    conv = nn.Conv2d(4, 4, 1).double()
    net = ReversibleSequence(AdditiveCoupling(make(conv), nn.Conv2d(4, 4, 1))).double()
    found = []
    for net.save_activations in (True, False):
        conv.zero_grad()
        net(small_input()).square().sum().backward()
        found.append(conv.weight.grad.clone())
    torch.testing.assert_close(*found)


def test_a_method_of_the_network_around():
    torch.manual_seed(0)
    net = Net().double()
    plain = Net().double()  # a method is bound to its module: a copy would use the first one's
    plain.load_state_dict(net.state_dict())
    plain.body.save_activations = True
    assert_same_step(net, plain, small_input())
    assert net.bn.num_batches_tracked == 1


def test_a_module_that_is_mentioned_by_name():
    assert modules_of(by_name) == (GLOBAL,)


def test_a_function_that_uses_none():
    assert modules_of(torch.sin) == modules_of(lambda x: torch.relu(x)) == ()


def test_a_buffer_that_requires_grad_is_an_error():
    """It came out of a hypernetwork, was put back by a copy, and the hypernetwork learned nothing."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.register_buffer("scale", torch.ones(4, 1, 1))

        def forward(self, x):
            return self.conv(x) * self.scale

    net = ReversibleSequence(AdditiveCoupling(Scaled(), nn.Conv2d(4, 4, 1))).double()
    hyper = nn.Linear(3, 4).double()
    net[0].f.scale = hyper(torch.ones(3, dtype=torch.float64)).view(4, 1, 1)
    with pytest.raises(RuntimeError, match="Scaled: the buffer 'scale' requires grad"):
        net(small_input())
    net.save_activations = True
    net(small_input()).sum().backward()
    assert hyper.weight.grad is not None


def test_empty_batches_are_taken():
    net = ReversibleSequence(AdditiveCoupling(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))).double()
    for each in (net, twin(net)):
        x = torch.zeros(0, 8, 6, 5, dtype=torch.float64, requires_grad=True)
        y = each(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert all(not p.grad.any() for p in each.parameters())
