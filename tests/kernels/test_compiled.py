"""Compiled passes of a CPU: made once for maps of all sizes, and seen by autograd where they write."""

import pytest
import torch

from revseg.kernels.bn_act.op import bn_act, bn_act_add
from tests.kernels.bn_act_cases import case, layouts, stream, ways


def graphs():
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@ways("compiled")
@layouts
def test_maps_of_another_size_take_the_same_loops(layout, passes):
    """Also of one image, as the last batch of an epoch may be."""

    def add(*size):
        given = case(size, torch.float32, layout, "prelu")
        return bn_act_add(given.u, given.norm(), stream(given, torch.float32))

    add(2, 3, 5, 7)
    before = graphs()
    for size in ((1, 3, 5, 7), (3, 4, 6, 9), (1, 2, 9, 4), (2, 6, 7, 5)):
        add(*size)
    assert graphs() == before


@ways("compiled", "blocks")
def test_what_was_saved_and_is_written_to_is_noticed(passes):
    given = case(dtype=torch.float32)
    w = torch.ones_like(given.u, requires_grad=True)
    y = w * given.u
    bn_act(given.u, given.norm(), out=given.u)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
