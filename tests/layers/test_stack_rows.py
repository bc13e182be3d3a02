"""A Stack in the place of `nn.Sequential`: the same modules, in a row."""

import copy

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, ReversibleSequence, Stack
from revseg.memory import saved_bytes
from tests.helpers import assert_same_result, run_step, small_f, small_input, twin
from tests.layers.stack_twins import stirred

SHAPE = (2, 4, 9, 7)

ROWS = {
    "conv, norm, activation": lambda: list(small_f()),
    "no activation": lambda: [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)],
    "no norm": lambda: [nn.Conv2d(4, 4, 1), nn.PReLU(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()],
    "norm first": lambda: [nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)],
    "unknown activation": lambda: [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 1)],
    "one module": lambda: [nn.Conv2d(4, 4, 1)],
    "none": list,
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("train", [True, False])
def test_the_numbers_and_names_are_those_of_sequential(row, train):
    plain = stirred(nn.Sequential(*row())).double().train(train)
    stack = Stack(*copy.deepcopy(plain)).train(train)
    assert list(stack.state_dict()) == list(plain.state_dict())
    assert_same_result(run_step(stack, small_input(*SHAPE)), run_step(plain, small_input(*SHAPE)))


def test_one_raw_map_a_layer_is_kept():
    sequential = nn.Sequential(*small_f()).double()
    stack, x = Stack(*sequential), small_input(*SHAPE)
    assert saved_bytes(lambda: stack(x)) == 3 * x.nbytes  # the input and two raw maps
    assert saved_bytes(lambda: sequential(x)) > 5 * x.nbytes


def test_inside_reversible_blocks():
    ours = ReversibleSequence(
        [AdditiveCoupling(Stack(*small_f()), Stack(*small_f())) for _ in range(3)]
    ).double()
    plain = ReversibleSequence(
        [AdditiveCoupling(*(nn.Sequential(*f) for f in (b.f, b.g))) for b in twin(ours)]
    )
    plain.save_activations = True
    x = small_input()
    assert_same_result(run_step(ours, x), run_step(plain, small_input()))


def test_hooks_on_any_module_of_a_layer_are_called():
    for i in range(3):
        stack, calls = Stack(*small_f()).double(), []
        stack[i].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        stack(small_input(*SHAPE))
        assert calls == [1]


def test_a_compiled_stack_keeps_the_saving():
    torch.compiler.reset()
    stack, x = Stack(*small_f()).double(), small_input(*SHAPE)
    compiled = torch.compile(stack, backend="eager")
    compiled(x)
    assert saved_bytes(lambda: compiled(x)) == saved_bytes(lambda: stack(x))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(stack.eval(), backend="eager", fullgraph=True)(x), stack(x))
    torch.compiler.reset()
