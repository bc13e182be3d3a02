"""Methods and groups of blocks that run again, against the same called once."""

import copy

import pytest
import torch
from torch import nn

from revseg.layers.recompute import Recompute
from revseg.layers.rerun import InGroups, Rerun
from revseg.memory import saved_bytes
from tests.helpers import assert_same_result, run_step, small_input


def block():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())


class Net(nn.Module):
    def __init__(self, on):
        super().__init__()
        self.first, self.last = block(), block()
        self.again = Rerun(on)

    def forward(self, x):
        x, height = self.again(self._first, (self.first,), x)
        return self.last(x) * height

    def _first(self, x):
        return self.first(x), x.shape[-2]


def test_a_method_runs_again_with_the_same_numbers():
    torch.manual_seed(0)
    ours, plain = Net(True).double(), Net(False).double()
    plain.load_state_dict(ours.state_dict())
    x = small_input(2, 4, 5, 6)
    assert_same_result(run_step(ours, x), run_step(plain, x), 0)
    assert saved_bytes(lambda: ours(x)) < saved_bytes(lambda: plain(x))
    ours.again.save_activations = True
    assert saved_bytes(lambda: ours(x)) == saved_bytes(lambda: plain(x))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_row_runs_again_in_groups_with_the_same_numbers(count, whole):
    torch.manual_seed(0)
    blocks = [Recompute(block()) for _ in range(count)]
    row = nn.Sequential(nn.Sequential(*blocks[:3]), *blocks[3:]).double()
    ours = InGroups(copy.deepcopy(row), whole=whole)
    assert list(ours.state_dict()) == list(row.state_dict())
    x = small_input(2, 4, 5, 6)
    found, expected = run_step(ours, x), run_step(row, x)
    for each in (found.gradients, found.buffers):
        each.update({n.removeprefix("module."): each.pop(n) for n in list(each)})
    assert_same_result(found, expected, 0)
    if count == 7:
        assert saved_bytes(lambda: ours(x)) < saved_bytes(lambda: row(x))
