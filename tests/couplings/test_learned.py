"""Couplings with parameters of their own."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from revseg import Coupling, InversionError, ReversibleSequence
from revseg.testing import ContractError, check
from tests.helpers import (
    assert_bitwise,
    assert_same_step,
    default_loss,
    gradient_error,
    run_step,
    small_f,
    small_input,
    twin,
)

OPTIONS = [{}, {"per_block": True}, {"keep": 2}, {"exact": "lossless"}]


class ReZero(Coupling):
    """y = x + alpha * h, alpha learned."""

    def __init__(self, f, g):
        super().__init__(f, g)
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def couple(self, x, h):
        return x + self.alpha * h

    def uncouple(self, y, h):
        return y - self.alpha * h


class WithGradients(ReZero):
    """Gives gradients itself, which know nothing of alpha."""

    def couple(self, x, h):
        return x + self.alpha * h

    def gradients(self, x, h, dy):
        return dy, dy * self.alpha


class Scaled(Coupling):
    """y = s * x + h, s from a module with a constant of this layer."""

    def __init__(self, f, g, power=0.5):
        super().__init__(f, g)
        self.scale, self.power = nn.Linear(1, 4, bias=False), power
        self.register_buffer("offset", torch.full((4, 1, 1), 0.1))

    def factor(self):
        return torch.exp(self.power * self.scale.weight.tanh())[..., None] + self.offset

    def couple(self, x, h):
        return x * self.factor() + h

    def uncouple(self, y, h):
        return (y - h) / self.factor()


class Constant(Coupling):
    """A constant that each layer has for itself, and no parameter."""

    def __init__(self, f, g, a=0.7):
        super().__init__(f, g)
        self.a = a

    def couple(self, x, h):
        return self.a * x + h

    def uncouple(self, y, h):
        return (y - h) / self.a


KINDS = [ReZero, WithGradients, Scaled, Constant]
kinds = pytest.mark.parametrize("kind", KINDS)


def sequence(kind, depth=2, **options):
    torch.manual_seed(0)
    return ReversibleSequence([kind(small_f(), small_f()) for _ in range(depth)], **options).double()


@kinds
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_is_that_of_plain_autograd(kind, options):
    ours = sequence(kind, **options)
    assert_same_step(ours, twin(ours), small_input())


@kinds
def test_lossless_is_bitwise(kind):
    ours = sequence(kind, exact="lossless").float()
    plain, x = twin(ours), small_input(dtype=torch.float32)
    assert_bitwise(run_step(ours, x), run_step(plain, x))


@kinds
def test_second_derivatives(kind):
    ours, found = sequence(kind), []
    for net in (ours, twin(ours)):
        x = small_input()
        inputs = [x, *net.parameters()]
        first = torch.autograd.grad(default_loss(net(x)), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)
        found.append(dict(enumerate(second)))
    assert gradient_error(*found) < 1e-8


def test_only_the_rule_is_learned():
    ours = sequence(ReZero)
    for block in ours:
        block.f.requires_grad_(False)
        block.g.requires_grad_(False)
    assert_same_step(ours, twin(ours), small_input(requires_grad=False))
    assert ours[0].alpha.grad is not None


def test_a_parameter_of_rule_and_function_gets_the_sum():
    ours = sequence(ReZero)
    ours[0].alpha = ours[1].alpha
    ours[0].f[2].weight = ours[1].alpha = nn.Parameter(torch.tensor([0.4], dtype=torch.float64))
    assert_same_step(ours, twin(ours), small_input())


def test_other_weights_by_functional_call():
    ours, x, found = sequence(ReZero), small_input(), []
    weights = {name: (p.detach() * 1.1).requires_grad_() for name, p in ours.named_parameters()}
    for net in (ours, twin(ours)):
        loss = default_loss(functional_call(net, weights, (x,)))
        found.append(dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)))
    assert gradient_error(*found) < 1e-9


@kinds
def test_they_keep_the_contract(kind):
    check(kind(small_f(), small_f()), torch.randn(2, 8, 6, 5), depth=2)


def test_a_parameter_that_is_none_of_the_module_is_an_error():
    class Stray(ReZero):
        def __init__(self, f, g):
            super().__init__(f, g)
            self.alpha = None
            self.stray = [torch.tensor(0.5, dtype=torch.float64, requires_grad=True)]

        def couple(self, x, h):
            return x + self.stray[0] * h

        def uncouple(self, y, h):
            return y - self.stray[0] * h

    with pytest.raises(RuntimeError, match="its gradient would be lost"):
        default_loss(sequence(Stray)(small_input())).backward()
    with pytest.raises(ContractError):
        check(Stray(small_f(), small_f()), torch.randn(2, 8, 6, 5))


def test_a_parameter_changed_between_the_passes_is_an_error():
    ours = sequence(ReZero)
    loss = default_loss(ours(small_input()))
    with torch.no_grad():
        ours[0].alpha.add_(1)
    with pytest.raises((RuntimeError, InversionError)):
        loss.backward()
