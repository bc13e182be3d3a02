"""What autograd is asked for: second derivatives, some gradients only, graphs used more than once.

The number in a comment is the line of the list of failures the tests were written from.
"""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from revseg import AdditiveCoupling, AffineCoupling, OneSidedCoupling, ReversibleSequence
from tests.helpers import (
    all_couplings,
    assert_same_gradients,
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    modes,
    pair_of_inputs,
    run_step,
    small_input,
    twin,
)


def conv_tanh(out_channels=4):
    """Smooth, so that it can be differentiated twice."""
    return nn.Sequential(
        nn.Conv2d(4, out_channels, 3, padding=1), nn.Tanh(), nn.Conv2d(out_channels, out_channels, 1)
    )


def smooth_sequence(**options):
    torch.manual_seed(0)
    return ReversibleSequence(
        AdditiveCoupling(conv_tanh(), conv_tanh()),
        OneSidedCoupling(conv_tanh()),
        AffineCoupling(conv_tanh(8), conv_tanh(8)),
        **options,
    ).double()


# --- second derivatives -------------------------------------------------------------------------


class Penalised(nn.Module):
    """The output, and the squared gradient of its loss by input and parameters."""

    def __init__(self, sequence):
        super().__init__()
        self.sequence = sequence

    def forward(self, x):
        y = self.sequence(x)
        asked = [p for p in (x, *self.sequence.parameters()) if p.requires_grad]
        gradients = torch.autograd.grad(default_loss(y), asked, create_graph=True)
        return y, sum(g.square().sum() for g in gradients)


@modes
@pytest.mark.parametrize("make", [smooth_sequence, all_couplings], ids=["smooth", "batch_norm"])
def test_a_gradient_penalty_is_not_dropped(make, options):  # 22
    sequence = make(**options)

    def loss(y, penalty):
        return default_loss(y) + penalty

    ours, plain = Penalised(sequence), Penalised(twin(sequence))
    with_penalty, _ = assert_same_step(ours, plain, small_input(), loss)
    without = run_step(ours, small_input(), lambda y, penalty: default_loss(y))
    assert gradient_error(without.gradients, with_penalty.gradients) > 1e-3


@modes
def test_first_and_second_derivatives_are_those_of_differences(options):  # 23
    sequence = smooth_sequence(**options)
    names = [name for name, _ in sequence.named_parameters()]

    def fn(x, *parameters):
        return functional_call(sequence, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (small_input(1, 8, 3, 2), *(p.detach().clone().requires_grad_() for p in sequence.parameters()))
    rounding = 1e-12 if options.get("keep") else 0.0  # a kept graph is of the stream before the rounding
    assert torch.autograd.gradcheck(fn, inputs, fast_mode=True, nondet_tol=rounding)
    assert torch.autograd.gradgradcheck(fn, inputs, fast_mode=True, nondet_tol=rounding)


def test_a_graph_of_the_gradient_can_be_asked_for_in_steps():  # 42
    sequence, x = smooth_sequence(), small_input()

    def third(module):
        value = default_loss(module(x))
        for _ in range(3):
            (dx,) = torch.autograd.grad(value, x, create_graph=True)
            value = dx.square().sum()
        return dx

    torch.testing.assert_close(third(sequence), third(twin(sequence)), rtol=1e-8, atol=1e-12)


# --- gradients of some --------------------------------------------------------------------------


@modes
def test_grad_by_the_input_leaves_parameters_alone(options):  # 31
    sequence, x = all_couplings(**options), small_input()
    plain = run_step(twin(sequence), x)
    (dx,) = torch.autograd.grad(default_loss(sequence(x)), x)
    assert x.grad is None
    assert all(p.grad is None for p in sequence.parameters())
    assert_same_gradients({"input 0": dx}, {"input 0": plain.gradients["input 0"]})


@modes
@pytest.mark.parametrize("name", ["blocks.0.f.0.weight", "blocks.1.f.2.weight", "blocks.2.g.5.weight"])
def test_grad_by_one_parameter_is_right_and_the_only_one(name, options):  # 32
    sequence, x = all_couplings(**options), small_input()
    plain = run_step(twin(sequence), x).gradients[name]
    parameter = sequence.get_parameter(name)
    (found,) = torch.autograd.grad(default_loss(sequence(x)), [parameter])
    assert_same_gradients({name: found}, {name: plain})
    default_loss(sequence(x)).backward(inputs=[parameter])
    assert_same_gradients({name: parameter.grad}, {name: plain})
    assert [n for n, p in sequence.named_parameters() if p.grad is not None] == [name]
    assert x.grad is None


@modes
def test_an_input_without_gradient_trains_the_parameters(options):  # 33
    sequence = all_couplings(**options)
    ours, _ = assert_same_step(sequence, twin(sequence), small_input(requires_grad=False))
    assert ours.gradients["input 0"] is None
    assert ours.gradients["blocks.0.f.0.weight"].abs().max() > 1e-6


@modes
@pytest.mark.parametrize("requires_grad", [(True, False), (False, True), (False, False)])
def test_one_stream_may_need_no_gradient(requires_grad, options):  # 34
    sequence = all_couplings(**options)
    assert_same_step(sequence, twin(sequence), pair_of_inputs(requires_grad))


FROZEN = {
    "first block": "blocks.0.",
    "middle block": "blocks.1.",
    "last block": "blocks.2.",
    "one parameter": "blocks.0.g.0.weight",
    "all": "",
}


@modes
@pytest.mark.parametrize("requires_grad", [False, True], ids=["constant", "variable"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters_get_none_and_the_others_all(frozen, requires_grad, options):  # 34
    sequence = all_couplings(**options)
    for name, parameter in sequence.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN[frozen]))
    x = small_input(requires_grad=requires_grad)
    if frozen == "all" and not requires_grad:
        y = sequence(x)
        assert not y.requires_grad
        torch.testing.assert_close(y, twin(sequence)(x))
    else:
        assert_same_step(sequence, twin(sequence), x)


def test_parameters_unfrozen_between_two_forward_passes_are_trained():  # 34
    sequence = all_couplings()
    reference = twin(sequence)
    for trainable in (False, True):
        for module in (sequence, reference):
            module[0].requires_grad_(trainable)
        assert_same_step(sequence, reference, small_input())
        assert_same_step(sequence, reference, small_input(requires_grad=False))


@modes
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "unfrozen"])
def test_parameters_frozen_or_unfrozen_after_the_forward_pass_are_as_in_plain(trainable, options):  # 34
    sequence = all_couplings(**options)
    sequence[1].requires_grad_(not trainable)
    gradients = []
    for module in (sequence, twin(sequence)):
        x = small_input()
        loss = default_loss(module(x))
        module[1].requires_grad_(trainable)
        loss.backward()
        gradients.append(gradients_of(module, x=x))
    assert_same_gradients(*gradients)
