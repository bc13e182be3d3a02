"""`Recompute` of a `Stack`, which gives its gradients itself: no graph is built."""

import copy

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, InversionError, Recompute, ReversibleSequence, Stack
from revseg.layers.blocks import ConvBNAct
from revseg.memory import peak_bytes
from revseg.replay.call import Call
from revseg.testing import plain_twin
from tests.helpers import assert_same_result, assert_same_step, run_step, small_input
from tests.layers.stack_twins import small_stack


@pytest.fixture
def calls(monkeypatch):
    """How often a function was prepared to run again with a graph."""
    seen = []
    original = Call.__init__

    def counted(self, *args):
        seen.append(args)
        original(self, *args)

    monkeypatch.setattr(Call, "__init__", counted)
    return seen


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("frozen", ["none", "first", "norms"])
def test_a_step_is_that_of_plain_autograd_and_builds_no_graph(train, requires_grad, frozen, calls):
    stack = small_stack().train(train)
    for i, p in enumerate(stack.parameters()):
        p.requires_grad_(not ((frozen == "first" and i < 4) or (frozen == "norms" and p.ndim == 1)))
    x = small_input(2, 8, 9, 7, requires_grad=requires_grad)
    ours, plain = Recompute(copy.deepcopy(stack)), Recompute(copy.deepcopy(stack), save_activations=True)
    assert_same_result(run_step(ours, x), run_step(plain, x), 1e-12)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_holds_in_the_second_run(dtype, calls):
    stack = Stack(ConvBNAct(8, 8), ConvBNAct(8, 6))
    x = small_input(2, 8, 9, 7, dtype=torch.float32)
    results = []
    for save in (False, True):
        module = Recompute(copy.deepcopy(stack), save_activations=save)
        with torch.autocast("cpu", dtype):
            y = module(x)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])))
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)
    assert not calls


def test_two_backward_passes_and_second_derivatives():
    stack = small_stack()
    x = small_input(2, 8, 5, 4)
    module, plain = Recompute(copy.deepcopy(stack)), copy.deepcopy(stack)
    for net in (module, plain):
        y = net(x)
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.autograd.gradgradcheck(
        Recompute(small_stack().eval()), small_input(1, 8, 3, 3), fast_mode=True
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda stack: stack.insert(1, nn.Dropout(0.0)),
        lambda stack: stack.register_forward_hook(lambda module, args, y: y * 2),
        lambda stack: stack[0].register_forward_hook(lambda module, args, y: y * 2),
    ],
    ids=["another module", "hook", "hook inside"],
)
def test_what_is_more_than_layers_runs_again_with_a_graph(change, calls):
    stack = small_stack()
    change(stack)
    x = small_input(2, 8, 9, 7)
    ours, plain = Recompute(copy.deepcopy(stack)), Recompute(copy.deepcopy(stack), save_activations=True)
    assert_same_result(run_step(ours, x), run_step(plain, x), 1e-12)
    assert calls


def test_inside_of_a_sequence_and_of_another():
    def f():
        return Recompute(Stack(ConvBNAct(4, 4), Recompute(Stack(ConvBNAct(4, 4), ConvBNAct(4, 4)))))

    sequence = ReversibleSequence(AdditiveCoupling(f(), f())).double()
    assert_same_step(sequence, plain_twin(sequence), small_input(2, 8, 6, 5))


def test_it_takes_no_more_than_the_stack_run_again_with_a_graph():
    stack, head = Stack(ConvBNAct(8, 8), ConvBNAct(8, 8)), nn.Conv2d(8, 1, 1)
    x = small_input(2, 8, 64, 64, dtype=torch.float32)

    def peak(body):
        def step():
            stack.zero_grad()
            head(body(x)).square().mean().backward()

        return peak_bytes(step, before=step)

    with_graph = nn.Sequential(stack)  # which does not say that it needs none
    assert peak(Recompute(stack)) <= 1.01 * peak(Recompute(with_graph))


def test_weights_changed_in_between_are_noticed():
    stack = small_stack()
    module = Recompute(stack)
    y = module(small_input(2, 8, 9, 7))
    stack[0][0].weight.data.mul_(2)  # behind the back of autograd
    with pytest.raises(InversionError, match=r"Recompute\(Stack\): run again on the same input"):
        y.sum().backward()
