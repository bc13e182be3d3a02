"""Why modules are no blocks: each candidate by name."""

import pytest
import torch
from torch import nn

from revseg import reversible
from tests.residual_nets import NormAfterSum, PreActivation, Projected, WritesToItsInput, images, row


class Two(PreActivation):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class Calls(nn.Module):
    """Two blocks, called by `call`."""

    def __init__(self, call, kind=Two):
        super().__init__()
        self.blocks = nn.ModuleList([kind(3), kind(3)])
        self.call = call

    def forward(self, x):
        return self.call(*self.blocks, x)


class Apart(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = PreActivation(3), PreActivation(3)

    def forward(self, x):
        return self.b(self.a(x))


class Tuple(PreActivation):
    def forward(self, x):
        return (super().forward(x), None)


def half(block):
    return nn.Sequential(block(3), nn.Conv2d(3, 4, 1), block(4))


REASONS = {
    "two arguments": (Calls(lambda a, b, x: b(a(x, 2.0), 2.0)), "blocks.0 to blocks.1: takes 2 arguments"),
    "keyword": (Calls(lambda a, b, x: b(a(x, scale=2.0), scale=2.0)), "blocks.0 to blocks.1: takes keyword arguments, scale"),
    "tuple": (Calls(lambda a, b, x: b(a(x)[0])[0], Tuple), "blocks.0 to blocks.1: takes a Tensor and returns a tuple"),
    "called twice": (Calls(lambda a, b, x: a(b(a(x))), PreActivation), "blocks.0 to blocks.1: a block, but not only the next one"),
    "not called": (Calls(lambda a, b, x: a(x), PreActivation), "blocks.1: is not called"),
    "apart": (Apart(), "a to b: a block, but in no nn.Sequential or nn.ModuleList"),
    "alone": (half(PreActivation), "0: a block, but not one of 2 or more in a row"),
    "shape": (half(PreActivation), r"1: makes \[2, 4, 8, 8\] torch.float32 of \[2, 3, 8, 8\] torch.float32"),
    "norm": (row(NormAfterSum), r"1 to 3: is not x \+ F\(x\)"),
    "projected": (row(Projected), r"1 to 3: is not x \+ F\(x\)"),
    "in place": (row(WritesToItsInput), "1 to 3: writes to its input"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REASONS)
def test_each_candidate_is_named_with_its_reason(kind):
    model, reason = REASONS[kind]
    with pytest.raises(ValueError, match=rf"found no residual blocks (.|\n)*\n  {reason}"):
        reversible(model, images(8, 8, dtype=torch.float32))


def test_blocks_that_the_user_did_not_choose_are_named():
    with pytest.raises(ValueError, match=r"\n  1 to 3: is not accepted by is_block"):
        reversible(row(PreActivation), images(8, 8, dtype=torch.float32), is_block=nn.Linear)


def test_the_list_has_an_end():
    model = nn.Sequential(*(m for _ in range(30) for m in (nn.Conv2d(3, 3, 1), PreActivation(3))))
    with pytest.raises(ValueError, match="and 40 more") as error:
        reversible(model, images(8, 8, dtype=torch.float32))
    assert str(error.value).count("\n") == 21


def test_an_error_of_the_network_is_its_own():
    with pytest.raises(RuntimeError, match="expected input"):
        reversible(nn.Sequential(nn.Conv2d(4, 4, 1)), torch.zeros(1, 3, 5, 5))
