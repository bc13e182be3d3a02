"""Functions that write: to tensors of their own they may, to their stream they may not."""

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, OneSidedCoupling, ReversibleSequence
from tests.helpers import (
    assert_same_step,
    modes,
    pair_of_inputs,
    run_step,
    small_f,
    small_input,
    twin,
)


def inplace_f():
    """In-place operations on what the function itself made."""
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 1),
        nn.Hardtanh(inplace=True),
        nn.Dropout(0.3, inplace=True),
    )


@modes
def test_inplace_operations_inside_a_function_are_right(options):  # 49
    torch.manual_seed(0)
    sequence = ReversibleSequence(
        AdditiveCoupling(inplace_f(), inplace_f()), OneSidedCoupling(inplace_f()), **options
    ).double()
    assert_same_step(sequence, twin(sequence), small_input())


OVERWRITING = {
    "relu first": nn.Sequential(nn.ReLU(inplace=True), small_f()),
    "add_": lambda x: x.add_(1).tanh(),
    "a view of it": lambda x: x.view(-1).mul_(2).view_as(x).tanh(),
    "a slice of it": lambda x: (x[:, :1].zero_(), x.tanh())[1],
    "written and returned": lambda x: x.mul_(2),
}


@pytest.mark.parametrize("as_pair", [False, True], ids=["tensor", "pair"])
@pytest.mark.parametrize("first", [True, False], ids=["f", "g"])
@pytest.mark.parametrize("writer", OVERWRITING)
@pytest.mark.parametrize(
    "options",
    [{}, {"per_block": True}, {"keep": 9}, {"save_activations": True}],
    ids=["whole", "per_block", "keep", "plain"],
)
def test_a_function_that_overwrites_its_stream_is_refused_by_name(writer, first, as_pair, options):  # 49
    fns = (OVERWRITING[writer], small_f())
    block = AdditiveCoupling(*(fns if first else reversed(fns)))
    sequence = ReversibleSequence(OneSidedCoupling(small_f()), block, **options).double()
    x = pair_of_inputs() if as_pair else small_input()
    with pytest.raises(RuntimeError, match="writes to its input, which cannot be undone") as error:
        sequence(x)
    assert f"AdditiveCoupling{', f' if first else ', g'}" in str(error.value).replace(")", "")


@pytest.mark.parametrize("as_pair", [False, True], ids=["tensor", "pair"])
@pytest.mark.parametrize("options", [{}, {"keep": 9}, {"save_activations": True}])
def test_a_first_function_that_overwrites_the_input_is_refused(as_pair, options):  # 49
    """The stream is then the caller's own tensor, or a view of it."""
    sequence = ReversibleSequence(OneSidedCoupling(OVERWRITING["relu first"]), **options).double()
    x = pair_of_inputs() if as_pair else small_input()
    with pytest.raises(RuntimeError):  # of a leaf that requires grad, torch's own
        sequence(x)
    inner = [each * 1 for each in x] if as_pair else x * 1
    with pytest.raises(RuntimeError, match="writes to its input"):
        sequence(inner)


class Breaking(nn.Module):
    """exp keeps its result for the backward pass, and the result is overwritten."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        h = self.conv(x).exp()
        return h.add_(1)


@modes
def test_a_saved_tensor_overwritten_by_a_function_gets_torch_error(options):  # 50
    sequence = ReversibleSequence(AdditiveCoupling(small_f(), Breaking()), **options).double()
    for module in (sequence, twin(sequence)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run_step(module, small_input())
