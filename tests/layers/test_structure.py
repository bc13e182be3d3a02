"""Values taken apart and put together; modules that take and return them, under `Recompute`."""

import collections
import dataclasses
import enum
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from revseg import Recompute
from revseg.layers.structure import closed_objects, put_together, take_apart
from tests.helpers import assert_same_result, run_step


@dataclasses.dataclass
class Heads:
    main: Tensor
    aux: Any = None
    name: str = "heads"


@dataclasses.dataclass(frozen=True)
class Frozen:
    main: Tensor


@dataclasses.dataclass(slots=True)
class Slots:
    main: Tensor


@dataclasses.dataclass
class Counted:
    """Whose constructor does something, and that has an attribute which is no field."""

    main: Tensor
    made: int = dataclasses.field(init=False)

    def __post_init__(self):
        self.made = 1
        self.twice = self.main * 2


Pair = collections.namedtuple("Pair", "first second")


class Colour(enum.Enum):
    RED = 1


class Box:
    def __init__(self, main):
        self.main = main


class Apply(nn.Module):
    """A convolution, and what `make` makes of its value."""

    def __init__(self, make):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1).double()
        self.make = make

    def forward(self, x):
        return self.make(self.conv(x))


def main_of(value):
    return value.main


OBJECTS = {
    "dataclass": (Heads, main_of),
    "with two tensors": (lambda y: Heads(y, y * 2), lambda v: v.main + v.aux),
    "nested": (lambda y: Heads(y, [Frozen(y + 1), {"a": Heads(y * 3)}]), lambda v: v.aux[1]["a"].main + v.aux[0].main),
    "in a tuple": (lambda y: (Frozen(y), 3), lambda v: v[0].main),
    "frozen": (Frozen, main_of),
    "slots": (Slots, main_of),
    "with an attribute of its own": (Counted, lambda v: v.twice * v.made),
    "namedtuple": (lambda y: Pair(y, Colour.RED), lambda v: v.first),
    "ordered": (lambda y: collections.OrderedDict(a=y, b=np.ones(2), c=torch.float32), lambda v: v["a"]),
    "default": (lambda y: collections.defaultdict(list, {"a": y}), lambda v: v["a"]),
    "deque": (lambda y: collections.deque([y, None]), lambda v: v[0]),
    "the value of an operation": (lambda y: torch.max(y, 1), lambda v: v.values),
    "with a shape": (lambda y: {"y": y, "shape": y.shape, "type": Heads, "span": slice(2)}, lambda v: v["y"]),
}  # fmt: skip


class Seen(nn.Module):
    """A module, and one tensor of what it returns."""

    def __init__(self, module, view):
        super().__init__()
        self.module, self.view = module, view

    def forward(self, x):
        return self.view(self.module(x))


@pytest.mark.parametrize("kind", OBJECTS)
def test_what_a_module_returns_has_the_gradients_of_plain_autograd(kind):
    """A dataclass came out with tensors that had none."""
    make, view = OBJECTS[kind]
    module = Apply(make)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    again, plain = (Seen(Recompute(module, save_activations=s), view) for s in (False, True))
    assert type(again.module(x)) is type(plain.module(x))
    assert_same_result(run_step(again, x), run_step(plain, x))


@pytest.mark.parametrize(
    "make", [Box, lambda y: [1, (Box(y),)], lambda y: Heads(y, Box(y)), lambda y: {y.sum()}]
)
def test_an_object_that_cannot_be_opened_is_refused(make):
    module = Recompute(Apply(make))
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"Recompute\(Apply\): expected .* got a (Box|set), inside of which"):
        module(x)
    module.save_activations = True
    module(x)


def test_dataclasses_are_opened_on_the_way_in():
    class Add(nn.Module):
        def forward(self, heads):
            return heads.main * heads.aux

    a, b = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    Recompute(Add())(Heads(a, b)).sum().backward()
    assert torch.equal(a.grad, b)
    assert torch.equal(b.grad, a)


def test_a_value_put_together_is_what_it_was():
    x, y = torch.zeros(2), torch.ones(3)
    value = [Heads(x, {"y": (y, x)}, "a"), 5]
    tensors, structure = take_apart(value)
    assert [id(t) for t in tensors] == [id(x), id(y)]
    assert not closed_objects(structure)
    again = put_together([x + 2, y + 2], structure)
    assert again[0].name == "a"
    assert again[1] == 5
    assert again[0].main is again[0].aux["y"][1]
    assert torch.equal(again[0].aux["y"][0], y + 2)
