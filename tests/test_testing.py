"""`revseg.testing.check` names what is wrong with a block, and passes what is right."""

import random

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, AffineCoupling, Coupling, HaarDownsample, OneSidedCoupling, Squeeze
from revseg.testing import ContractError, check


def f(channels: int = 4, out: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.PReLU(out), nn.Dropout(0.2)
    )


@pytest.mark.parametrize(
    "block",
    [
        AdditiveCoupling(f(), f()),
        OneSidedCoupling(f()),
        AffineCoupling(f(4, 8), f(4, 8)),
        Squeeze(),
        HaarDownsample(),
    ],
    ids=lambda block: type(block).__name__,
)
@pytest.mark.parametrize("pair", [False, True])
def test_right_blocks_pass_and_stay_as_they_were(block, pair):
    state = {name: value.clone() for name, value in block.state_dict().items()}
    x = torch.randn(2, 8, 6, 10)
    random_state = torch.get_rng_state()
    check(block, x.chunk(2, 1) if pair else x)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())
    assert all(p.grad is None for p in block.parameters())


class Counter(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class Outsider(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = [nn.Parameter(torch.ones(1))]

    def forward(self, x):
        return x * self.hidden[0]


class WrongInverse(AdditiveCoupling):
    @classmethod
    def uncouple(cls, y, h):
        return y + h


class WrongGradient(AdditiveCoupling):
    @classmethod
    def gradients(cls, x, h, dy):
        return dy, 2 * dy


class NoRule(Coupling):
    pass


class Chatty(nn.Module):
    def forward(self, x):
        return x, "done"


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        (AdditiveCoupling(Counter(), f()), "f: the function gives other values when it is run again"),
        (AdditiveCoupling(f(), lambda x: x * random.random()), "g: the function gives other values"),
        (AdditiveCoupling(nn.ReLU(inplace=True), f()), "f: the function writes to its input"),
        (AdditiveCoupling(f(4, 5), f()), r"f: cannot update a stream \[2, 4, 6, 10\].*\[2, 5, 6, 10\]"),
        (AdditiveCoupling(Chatty(), f()), "f: the function must return one tensor, got tuple"),
        (AdditiveCoupling(Outsider(), f()), r"f: the function uses a tensor \[1\].* is no parameter"),
        (AffineCoupling(f(), f()), "needs a function value of 8 channels"),
        (WrongInverse(f(), f()), r"uncouple\(couple\(x, h\), h\) must be x, and is off by"),
        (WrongGradient(f(), f()), r"gradients\(x, h, dy\) are off by 0.7. from autograd's"),
        (
            AdditiveCoupling(lambda x: 1000 * x.sin(), torch.cos),
            "amplifies rounding errors too much for 8 blocks in float32",
        ),
        (AdditiveCoupling(lambda x: x.double(), f()), "must keep the stream's shape, dtype and device"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_wrong_blocks_are_named_in_one_sentence(block, sentence):
    with pytest.raises(ContractError, match=sentence):
        check(block, torch.randn(2, 8, 6, 10))


def test_a_coupling_without_rule_says_what_to_define():
    with pytest.raises(NotImplementedError, match=r"NoRule must define couple\(x, h\)"):
        NoRule(f(), f())(torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2))
