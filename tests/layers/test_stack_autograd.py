"""`Stack` and autograd: what it keeps, backward passes again and of a higher order, contexts."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from revseg.layers.stack import Stack
from revseg.memory import saved_bytes
from tests.helpers import (
    assert_same_gradients,
    default_loss,
    gradients_of,
    relative_error,
    run_step,
    small_input,
)
from tests.layers.stack_twins import Plain, by_name, layer, small_stack, stirred

SHAPE = (2, 8, 9, 7)


def both(steps, stack=None):
    """What `steps(module)` returns for a stack and for its modules."""
    stack = small_stack() if stack is None else stack
    plain = Plain(stack)
    return steps(stack), by_name(steps(plain))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_keeps_its_input_and_one_raw_map_a_layer(layers, dtype):
    stack = Stack(*(layer(8, 8, 3) for _ in range(layers))).to(dtype)
    x = small_input(2, 8, 12, 10, dtype=dtype)
    one = x.nbytes
    assert saved_bytes(lambda: stack(x)) == one + layers * one
    plain = saved_bytes(lambda: Plain(stack)(x))  # and the normalised and the activated map, but the last
    assert one + 3 * layers * one - one <= plain <= one + 3 * layers * one - one + layers * 8 * 4 * 4


def test_maps_of_other_sizes_count_as_large_as_they_are():
    x = small_input(*SHAPE)
    raw = 8 * 2 * (6 * 9 * 7 + 6 * 9 * 7 + 5 * 5 * 4)  # 8 bytes; C h w of three layers
    assert saved_bytes(lambda: small_stack()(x)) == x.nbytes + raw
    with torch.no_grad():
        assert saved_bytes(lambda: small_stack()(x)) == 0


def test_neither_the_input_nor_the_gradient_is_written_to():
    for count in (1, 3):
        stack = Stack(*list(small_stack())[:count]) if count == 1 else small_stack()
        x = small_input(*SHAPE)
        before = x.detach().clone()
        z = stack(x)
        dz = small_input(*z.shape, seed=1, requires_grad=False)
        given = dz.clone()
        z.backward(given)
        assert torch.equal(given, dz)
        assert torch.equal(x.detach(), before)


def test_another_backward_pass_over_a_kept_graph_gives_the_same():
    stack, x = small_stack(), small_input(*SHAPE)
    asked = [x, *stack.parameters()]
    loss = default_loss(stack(x))
    first = torch.autograd.grad(loss, asked, retain_graph=True)
    second = torch.autograd.grad(loss, asked, retain_graph=True)
    third = torch.autograd.grad(loss, asked)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        torch.autograd.grad(loss, asked)


def test_a_second_backward_without_retaining_is_refused():
    stack = small_stack()
    z = stack(small_input(*SHAPE))
    z.sum().backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        z.sum().backward()


@pytest.mark.parametrize("change", ["weight", "input"])
def test_what_is_changed_before_the_backward_pass_is_refused(change):
    stack, x = small_stack(), small_input(*SHAPE, requires_grad=False)
    z = stack(x)
    with torch.no_grad():
        (stack[0][0].weight if change == "weight" else x).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_the_output_may_be_changed():
    def steps(module):
        return run_step(module, small_input(*SHAPE), lambda z: default_loss(z.add_(1))).gradients

    assert_same_gradients(*both(steps, Stack(layer(8, 6), layer(6, 5)).double()))


@pytest.mark.parametrize("train", [True, False])
def test_gradients_of_gradients(train):
    stack = stirred(Stack(layer(2, 3), layer(3, 2, act=nn.LeakyReLU(0.3)))).double().train(train)
    x = small_input(2, 2, 3, 2)
    assert torch.autograd.gradcheck(stack, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(stack, x, fast_mode=True)

    names = [name for name, _ in stack.named_parameters()]

    def of_parameters(*values):
        return functional_call(stack, dict(zip(names, values, strict=True)), x.detach())

    values = [p.detach().clone().requires_grad_() for p in stack.parameters()]
    assert torch.autograd.gradgradcheck(of_parameters, values, fast_mode=True)


@pytest.mark.parametrize("train", [True, False])
def test_a_gradient_penalty_is_that_of_its_modules(train):
    def steps(module):
        x = small_input(*SHAPE)
        loss = default_loss(module(x))
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + dx.square().sum()).backward()
        return gradients_of(module, x=x)

    assert_same_gradients(*both(steps, small_stack().train(train)))


def test_gradients_by_some_of_the_inputs():
    def steps(module):
        x = small_input(*SHAPE)
        named = {"x": x, **by_name(dict(module.named_parameters()))}
        found = {}
        for chosen in (["x"], ["0.0.weight"], ["1.1.2.weight", "x"], ["1.0.1.bias", "0.2.weight"]):
            chosen = [name for name in chosen if name in named]
            gradients = torch.autograd.grad(default_loss(module(x)), [named[name] for name in chosen])
            found |= {f"{chosen} {name}": g for name, g in zip(chosen, gradients, strict=True)}
        return found

    assert_same_gradients(*both(steps))


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autograd.graph.save_on_cpu(),
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True).copy(), torch.from_numpy),
        lambda: torch.autograd.detect_anomaly(),
    ],
    ids=["save_on_cpu", "identity", "numpy", "anomaly"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_contexts_change_nothing(context):
    stack, x = small_stack(), small_input(*SHAPE)
    expected = by_name(run_step(Plain(stack), x).gradients)
    with context():
        ours = run_step(stack, x).gradients
        assert_same_gradients(ours, expected)
        loss = default_loss(stack(x))
        twice = [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*twice)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("train", [True, False])
def test_autocast_makes_at_most_twice_the_error_of_its_modules(dtype, train):
    stack = small_stack(torch.float32).train(train)
    x = small_input(2, 8, 33, 29, dtype=torch.float32)

    def step(module, x, enabled):
        module.zero_grad()
        x = x.detach().clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=enabled):
            z = module(x)
        default_loss(z.to(x.dtype)).backward()  # outside, as it should be
        return z, by_name(gradients_of(module, x=x))

    truth, exact = step(Plain(copy.deepcopy(stack).double()), x.detach().double(), False)
    expected, plain = step(Plain(stack), x, True)
    found, ours = step(stack, x, True)
    assert found.dtype == expected.dtype == dtype
    assert all(g.dtype == torch.float32 for g in ours.values())
    assert relative_error(ours, exact) <= 2 * relative_error(plain, exact)
    assert (found - truth).norm() <= 2 * (expected - truth).norm()


@pytest.mark.parametrize("train", [True, False])
def test_gradients_of_gradients_under_autocast(train):
    stack = small_stack(torch.float32).train(train)

    def steps(module):
        x = small_input(*SHAPE, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            z = module(x)
        (dx,) = torch.autograd.grad(default_loss(z.float()), x, create_graph=True)
        dx.square().sum().backward()
        return gradients_of(module, x=x)

    assert_same_gradients(*both(steps, stack), tolerance=0.05)


def test_autocast_of_weights_stays_usable_after_a_run_without_gradients():
    """Its cache must not hold casts made without a graph: a later use would be cut off from its weight."""
    stack, x = small_stack(torch.float32), small_input(*SHAPE, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        stack(x)
        z = Plain(stack).stack[0][0](x).sum() + stack[0][0](x).float().sum()
    z.backward()
    assert stack[0][0].weight.grad.abs().sum() > 0


def test_weights_may_be_shared():
    class Tied(nn.Module):
        def __init__(self, make):
            super().__init__()
            first, second = layer(8, 8), layer(8, 8)
            second[0].weight, second[2].weight = first[0].weight, first[2].weight
            self.stack, self.make = make(Stack(stirred(first), second).double()), make

        def forward(self, x):
            inner = self.stack.stack if isinstance(self.stack, Plain) else self.stack
            return self.stack(x) + torch.conv2d(x, inner[0][0].weight, padding=1)

    results = []
    for make in (lambda s: s, Plain):
        torch.manual_seed(0)
        results.append(run_step(Tied(make), small_input(2, 8, 5, 6)).gradients)
    ours, plain = (dict(enumerate(gradients.values())) for gradients in results)
    assert_same_gradients(ours, plain)


def test_the_same_layer_twice():
    block = stirred(layer(8, 8)).double()
    stack = Stack(block, block)
    ours, plain = (run_step(m, small_input(2, 8, 5, 6)) for m in (stack, Plain(stack)))
    assert_same_gradients(ours.gradients, by_name(plain.gradients))
    assert all(
        torch.allclose(a, b) for a, b in zip(ours.buffers.values(), plain.buffers.values(), strict=True)
    )
    assert stack[0][1].num_batches_tracked == 2


def test_functional_call_differentiates_by_the_parameters_it_was_given():
    def steps(module):
        given = {name: (2 * p).detach().requires_grad_() for name, p in module.named_parameters()}
        x = small_input(*SHAPE)
        default_loss(functional_call(module, given, x)).backward()
        assert all(p.grad is None for p in module.parameters())
        return {name: p.grad for name, p in given.items()} | {"x": x.grad}

    assert_same_gradients(*both(steps))
