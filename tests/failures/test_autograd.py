"""What autograd is asked for: second derivatives, some gradients only, graphs used more than once.

The number in a comment is the line of the list of failures the tests were written from.
"""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from revseg import AdditiveCoupling, AffineCoupling, Coupling, OneSidedCoupling, ReversibleSequence
from tests.helpers import (
    all_couplings,
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    modes,
    pair_of_inputs,
    run_step,
    small_f,
    small_input,
    small_sequence,
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


def assert_same_gradients(ours, plain, tolerance=1e-9):
    assert gradient_error(ours, plain) <= tolerance


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


# --- None is not zero ---------------------------------------------------------------------------


class WithUnused(nn.Module):
    """A parameter that takes no part, and one that takes part without gradient."""

    def __init__(self):
        super().__init__()
        self.used, self.detached = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        with torch.no_grad():
            a = self.detached(x)
        return self.used(x).tanh() + a + self.detached(x).detach()


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(x).detach()


@modes
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kind", [AdditiveCoupling, OneSidedCoupling, AffineCoupling])
def test_one_output_unused_leaves_the_same_gradients_none(kind, which, options):  # 35
    sequence = small_sequence(kind, 2, **options)
    ours, _ = assert_same_step(
        sequence, twin(sequence), pair_of_inputs(), lambda *outputs: default_loss(outputs[which])
    )
    last = {AdditiveCoupling: "g", AffineCoupling: "g", OneSidedCoupling: "f"}[kind]
    if which == 0 and kind is not OneSidedCoupling:
        assert ours.gradients[f"blocks.1.{last}.0.weight"] is None


@modes
def test_unused_parameters_get_none(options):  # 35
    sequence = ReversibleSequence(
        AdditiveCoupling(WithUnused(), Detached()), OneSidedCoupling(Detached()), **options
    ).double()
    ours, _ = assert_same_step(sequence, twin(sequence), small_input())
    for name in ("f.unused.weight", "f.detached.weight", "g.conv.weight"):
        assert ours.gradients[f"blocks.0.{name}"] is None


@modes
def test_an_unused_sequence_gets_none(options):  # 35
    """Its output takes part in the graph, and no gradient comes back."""
    sequence, x = all_couplings(**options), small_input()
    y1, y2 = sequence(x.chunk(2, 1))
    (y1.detach().sum() + x.sum() + 0 * torch.where(torch.tensor(True), x.sum(), y2.sum())).backward()
    expected = twin(sequence)
    z = small_input()
    w1, w2 = expected(z.chunk(2, 1))
    (w1.detach().sum() + z.sum() + 0 * torch.where(torch.tensor(True), z.sum(), w2.sum())).backward()
    assert_same_gradients(gradients_of(sequence, x=x), gradients_of(expected, x=z))


# --- functions of every kind --------------------------------------------------------------------

FUNCTIONS = {
    "identity": nn.Identity(),
    "returns its input": lambda x: x,
    "a view": lambda x: x.view(-1).view_as(x),
    "a flipped view": lambda x: x.transpose(2, 3).transpose(2, 3),
    "permuted": lambda x: x.tanh().permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
    "expanded": lambda x: x.mean((2, 3), keepdim=True).expand_as(x),
    "a constant": lambda x: torch.ones_like(x),
    "torch.tanh": torch.tanh,
    "channels_last": lambda x: x.sin().contiguous(memory_format=torch.channels_last),
}


@modes
@pytest.mark.parametrize("kind", [AdditiveCoupling, OneSidedCoupling])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_without_parameters_are_right(function, kind, options):  # 36
    fn = FUNCTIONS[function]
    block = kind(fn) if kind is OneSidedCoupling else kind(fn, fn)
    sequence = ReversibleSequence(block, AdditiveCoupling(small_f(), fn), **options).double()
    assert_same_step(sequence, twin(sequence), small_input())
    assert_same_step(sequence, twin(sequence), pair_of_inputs())


class Untouched(Coupling):
    """Rules that give back what they were given, themselves or a view of it."""

    @classmethod
    def couple(cls, x, h):
        return x if h.shape[0] else h

    uncouple = couple


class UntouchedView(Untouched):
    @classmethod
    def couple(cls, x, h):
        return x.view_as(x)

    uncouple = couple


class FirstOnly(AdditiveCoupling):
    """A block that leaves the second stream as it came."""

    def steps(self, name=""):
        return super().steps(name)[:1]


@modes
@pytest.mark.parametrize("block", [Untouched, UntouchedView, FirstOnly])
def test_streams_that_pass_through_come_out_as_tensors_of_their_own(block, options):  # 36
    sequence = ReversibleSequence(block(small_f(), small_f()), **options).double()
    assert_same_step(sequence, twin(sequence), pair_of_inputs())
    pair = pair_of_inputs()
    for x, y in zip(pair, sequence(pair), strict=True):
        assert y is not x
        assert y._base is None
        assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
