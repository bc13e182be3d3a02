"""Outputs and parameters that no loss reads, functions without parameters, streams that pass through."""

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, AffineCoupling, Coupling, OneSidedCoupling, ReversibleSequence
from tests.helpers import (
    all_couplings,
    assert_same_gradients,
    assert_same_step,
    default_loss,
    gradients_of,
    modes,
    pair_of_inputs,
    small_f,
    small_input,
    small_sequence,
    twin,
)


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
