"""Modules of a stack that somebody has changed: weights that are made for each use, functions put in place of `forward`."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from revseg import AdditiveCoupling, OneSidedCoupling, ReversibleSequence, Stack
from revseg.layers.blocks import ConvBNAct
from revseg.layers.conv_pool import ConvPool
from revseg.models.cgnet import Surroundings
from revseg.models.espnet_esp import ESP
from revseg.models.vnet_cpp import CPP
from tests.helpers import assert_bitwise, run_step


class Noise(nn.Module):
    """A weight that draws, as DropConnect's does."""

    def forward(self, weight):
        return weight + torch.randn_like(weight)


def with_noise(conv):
    parametrize.register_parametrization(conv, "weight", Noise())
    return conv


WEIGHTS = {
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "one that draws": with_noise,
}
PLACES = {
    "a row": lambda conv: (conv, nn.BatchNorm2d(4), nn.ReLU()),
    "a row without activation": lambda conv: (conv, nn.BatchNorm2d(4)),
    "between layers": lambda conv: (ConvBNAct(4, 4), conv, nn.BatchNorm2d(4), nn.ReLU(), ConvBNAct(4, 4)),
    "at the end": lambda conv: (ConvBNAct(4, 4), conv),
}


def results(*modules):
    """One step of each, from one seed."""
    found = []
    for module in modules:
        torch.manual_seed(1)
        x = torch.randn(2, 4, 6, 5, requires_grad=True)
        found.append(run_step(module, x))
    return found


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("place", PLACES)
def test_a_weight_made_for_each_use_is_made_once(place, weight, kind):
    """It was asked for before anything knew whether the stack may: spectral norm iterated twice a pass."""
    torch.manual_seed(0)
    row = PLACES[place](WEIGHTS[weight](kind(4, 4, 3, padding=1)))
    stack, plain = Stack(*copy.deepcopy(row)), nn.Sequential(*copy.deepcopy(row))
    ours, theirs = results(stack, plain)
    if place in ("a row", "a row without activation"):
        assert_bitwise(ours, theirs)
    for mine, other in zip(ours.outputs, theirs.outputs, strict=True):
        torch.testing.assert_close(mine, other)
    for name, buffer in theirs.buffers.items():
        torch.testing.assert_close(ours.buffers[name], buffer)


def seven(x):
    return x * 0 + 7


def replaced(module, name="forward"):
    vars(module)[name] = seven if name == "forward" else lambda x, weight, bias: seven(x)


ROW = {
    "convolution": lambda row: replaced(row[0]),
    "its function": lambda row: replaced(row[0], "_conv_forward"),
    "norm": lambda row: replaced(row[1]),
    "activation": lambda row: replaced(row[2]),
}


@pytest.mark.parametrize("part", ROW)
def test_a_replaced_function_of_a_part_runs(part):
    row = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    ROW[part](row)
    block = ConvBNAct(4, 4, 1)
    for i in range(3):
        block[i] = row[i]
    x = torch.randn(2, 4, 3, 3)
    for module in (Stack(*row), Stack(block), Stack(Stack(*row)), block):
        torch.testing.assert_close(module.eval()(x), row.eval()(x))


@pytest.mark.parametrize("coupling", [AdditiveCoupling, OneSidedCoupling])
def test_a_stack_with_a_function_of_its_own_runs_it_everywhere(coupling):
    stack = Stack(ConvBNAct(4, 4), ConvBNAct(4, 4))
    replaced(stack)
    x = torch.randn(2, 4, 3, 3)
    for module in (stack, Stack(stack), Stack(ConvBNAct(4, 4), stack)):
        assert torch.equal(module(x), torch.full_like(x, 7))
    functions = (stack, nn.Identity()) if coupling is AdditiveCoupling else (stack,)
    kept, undone = (ReversibleSequence(coupling(*functions), save_activations=s) for s in (True, False))
    pair = [x.requires_grad_(), x.detach() * 0]
    for ours, theirs in zip(undone(pair), kept(pair), strict=True):
        torch.testing.assert_close(ours, theirs)


MODULES = {
    "ConvBNAct": (lambda: ConvBNAct(4, 8), ("0", "1", "2")),
    "ConvPool": (lambda: ConvPool(4, 8), ("conv", "norm", "norm.0", "norm.1")),
    "CPP": (lambda: CPP(4, 8), ("pointwise", "pools.1", "norm", "norm.0", "norm.1")),
    "ESP": (lambda: ESP(4, 8), ("reduce", "dilated.2", "norm", "norm.0", "norm.1")),
    "Surroundings": (lambda: Surroundings(4, 2), ("local", "surround", "norm", "norm.0", "norm.1")),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in MODULES for name in MODULES[kind][1]])
def test_a_replaced_function_inside_of_a_module_that_is_a_layer_runs(kind, name):
    module = MODULES[kind][0]()
    part, calls = module.get_submodule(name), []
    original = part.forward
    part.forward = lambda *args: calls.append(name) or original(*args)
    module(torch.randn(2, 4, 8, 8))
    Stack(module)(torch.randn(2, 4, 8, 8))
    assert calls == [name, name]
