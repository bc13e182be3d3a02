"""`Recompute` under everything autograd is asked for; against plain autograd, bit for bit.

The number in a comment is the line of the list of failures the tests were written from.
"""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from revseg import Recompute, is_recomputing
from tests.helpers import (
    assert_equal_gradients,
    assert_same_gradients,
    assert_same_step,
    default_loss,
    gradients_of,
    recomputed,
    run_step,
    small_input,
    twin,
)


def both(steps, net=None):
    """What `steps(net)` returns for the network and for its plain twin, from one seed."""
    net = recomputed() if net is None else net
    results = []
    for module in (net, twin(net)):
        torch.manual_seed(5)
        results.append(steps(module))
    return results


def test_gradients_of_gradients():  # 22, 42
    def steps(net):
        x = small_input()
        y = net(x)
        asked = [x, *net.parameters()]
        gradients = torch.autograd.grad(default_loss(y), asked, create_graph=True)
        (default_loss(y) + sum(g.square().sum() for g in gradients)).backward()
        return gradients_of(net, x=x)

    assert_same_gradients(*both(steps), tolerance=1e-13)


def test_first_and_second_derivatives_are_those_of_differences():  # 23
    layers = Recompute(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double())
    x = small_input(2, 3)
    parameters = tuple(layers.parameters())

    def fn(x, *parameters):
        names = [name for name, _ in layers.named_parameters()]
        return functional_call(layers, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(fn, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(fn, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("asked", ["input", "parameter"])
def test_grad_by_some_writes_no_other(asked):  # 31, 32
    def steps(net):
        x = small_input()
        target = x if asked == "input" else net[1].module[0].weight
        (gradient,) = torch.autograd.grad(default_loss(net(x)), target)
        assert all(p.grad is None for p in (x, *net.parameters()))
        return {"": gradient}

    assert_equal_gradients(*both(steps))


@pytest.mark.parametrize("requires_grad", [True, False], ids=["variable", "constant"])
@pytest.mark.parametrize("frozen", ["", "module.0", "module.4.bias", "module", "all"])
def test_frozen_parameters_get_none_and_the_others_all(frozen, requires_grad):  # 33, 34
    net = recomputed()
    for name, p in net.named_parameters():
        p.requires_grad_(not (frozen == "all" or (frozen and name.startswith(f"1.{frozen}"))))
    if frozen == "all" and not requires_grad:
        assert not net(small_input(requires_grad=False)).requires_grad
    else:
        assert_same_step(net, twin(net), small_input(requires_grad=requires_grad), tolerance=0.0)


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "unfrozen"])
def test_parameters_frozen_or_unfrozen_after_the_forward_pass_are_as_in_plain(trainable):  # 34
    def steps(net):
        net[1].requires_grad_(not trainable)
        x = small_input()
        loss = default_loss(net(x))
        net[1].requires_grad_(trainable)
        loss.backward()
        return gradients_of(net, x=x)

    assert_equal_gradients(*both(steps))


def test_unused_parameters_and_cut_results_get_none():  # 35
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.cut = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x):
            return self.used(x), self.cut(x).detach()

    net = Recompute(Partly()).double()
    ours = run_step(net, small_input(2, 3))
    plain = run_step(twin(net), small_input(2, 3), lambda y, cut: default_loss(y, cut))
    assert [name for name, g in ours.gradients.items() if g is None] == [
        name for name, g in plain.gradients.items() if g is None
    ]
    assert_equal_gradients(ours.gradients, plain.gradients)


def test_a_tensor_from_outside_is_refused_by_name():  # 35
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)

    class Closure(nn.Module):
        def forward(self, x):
            return x * factor

    with pytest.raises(
        RuntimeError, match=r"Recompute\(Closure\): the function uses a tensor .* no parameter"
    ):
        Recompute(Closure())(small_input()).sum().backward()


def test_hooks_of_parameters_run_once():  # 24, 25, 26
    def steps(net):
        p, calls = net[1].module[0].weight, []
        p.register_hook(lambda g: 3 * g)
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.clone()))
        x = small_input()
        default_loss(net(x)).backward()
        assert len(calls) == 1
        return gradients_of(net, x=x)

    assert_equal_gradients(*both(steps))


def test_hooks_of_modules_see_what_plain_hooks_see():  # 27, 28, 29
    def steps(net):
        seen = []
        inner = net[1].module[0]
        inner.register_forward_hook(lambda m, x, y: 2 * y)
        inner.register_forward_pre_hook(
            lambda m, x: None if is_recomputing() else seen.append(x[0].detach().clone())
        )
        inner.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 0.5,))
        x = small_input()
        default_loss(net(x)).backward()
        assert len(seen) == 1
        return gradients_of(net, x=x) | {"seen": seen[0]}

    assert_equal_gradients(*both(steps))


def test_a_second_backward_pass_adds_the_same_and_moves_nothing():  # 39, 40, 68
    def steps(net):
        x = small_input()
        loss = default_loss(net(x))
        for seed in range(2):
            torch.manual_seed(seed)
            loss.backward(retain_graph=seed == 0)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
        return gradients_of(net, x=x) | {name: b.double() for name, b in net.named_buffers()}

    assert_equal_gradients(*both(steps))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forward_passes_may_be_differentiated_in_any_order(order):  # 41
    def steps(net):
        x = [small_input(seed=seed) for seed in range(2)]
        losses = [default_loss(net(each)) for each in x]
        for i in order:
            losses[i].backward()
        return gradients_of(net, x0=x[0], x1=x[1])

    assert_equal_gradients(*both(steps))


def test_a_result_changed_in_place_is_right():  # 43, 45
    def steps(net):
        x = small_input()
        y = net[1](net[0](x))
        y.add_(1)
        y[:, 1].mul_(2)
        default_loss(net[2](y)).backward()
        return gradients_of(net, x=x)

    assert_equal_gradients(*both(steps))


@pytest.mark.parametrize("what", ["input", "parameter"])
def test_what_is_changed_before_the_backward_pass_is_an_error(what):  # 46
    net = recomputed()
    x = net[0](small_input())
    loss = default_loss(net[1](x))
    with torch.no_grad():
        (x if what == "input" else net[1].module[0].weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_input_changed_behind_the_back_of_autograd_is_noticed():  # 43
    net = recomputed()
    x = small_input()
    loss = default_loss(net[1](x))
    x.data[0] *= 3
    with pytest.raises(RuntimeError, match="the module gave other values"):
        loss.backward()


def test_upstream_gradients_stay_as_they_are():  # 48, 60
    net = recomputed()
    y = net[1](small_input())
    dy = torch.ones((), dtype=torch.float64).expand(y.shape)
    y.backward(dy)
    assert torch.equal(dy, torch.ones(y.shape, dtype=torch.float64))
