"""A plan and the network that it is put on."""

import pytest
from torch import nn

from revseg.memory.apply import Part, apply_parts


def test_a_row_that_is_shorter_than_the_plans_is_refused():
    part = Part("", 1, 3)
    with pytest.raises(ValueError, match="expected a row of 3 modules at the least, got 2"):
        apply_parts(nn.Sequential(nn.ReLU(), nn.ReLU()), (part,))
