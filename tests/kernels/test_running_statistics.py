"""Running statistics moved on by a batch, against a batch norm of PyTorch."""

import pytest
import torch

from revseg.kernels.running_statistics.op import move_statistics, moved_statistics
from tests.kernels.running_statistics_cases import CHANNELS, assert_as_in_pytorch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("momentum", "counts"), [(0.1, True), (0.1, False), (None, True), (1.0, True), (0.0, True)]
)
def test_moves_as_pytorch_does(momentum, counts, dtype):
    assert_as_in_pytorch(move_statistics, momentum, counts, dtype)


def test_without_momentum_and_count_nothing_moves():
    mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    batch = torch.full((2, CHANNELS), 3.0, dtype=torch.float64)
    move_statistics(mean, var, None, *batch, 10, None)
    assert torch.equal(mean, torch.zeros(CHANNELS))
    assert torch.equal(var, torch.ones(CHANNELS))


def test_a_single_value_has_no_variance():
    buffers = torch.zeros(CHANNELS), torch.ones(CHANNELS), torch.tensor(0)
    batch = torch.zeros(2, CHANNELS, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected at least 2 values a channel, got 1"):
        move_statistics(*buffers, *batch, 1, 0.1)
    assert buffers[2] == 0


def test_copies_leave_the_arguments_alone():
    buffers = torch.zeros(CHANNELS), torch.ones(CHANNELS), torch.tensor(0)
    batch = torch.full((2, CHANNELS), 3.0, dtype=torch.float64)
    moved = moved_statistics(*buffers, *batch, 10, 0.5)
    assert torch.equal(buffers[0], torch.zeros(CHANNELS))
    assert torch.equal(moved[0], torch.full((CHANNELS,), 1.5))
    assert (buffers[2], moved[2]) == (0, 1)
