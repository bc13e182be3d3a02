"""Running statistics moved on by a Triton kernel, against a batch norm of PyTorch."""

import pytest
import torch

from revseg.kernels.running_statistics import op
from revseg.kernels.running_statistics.gpu import move_statistics as move_statistics_op
from revseg.kernels.running_statistics.op import move_statistics
from tests.interpreted.guarded import guarded, survives
from tests.kernels.running_statistics_cases import CHANNELS, assert_as_in_pytorch


def arguments(counts=True):
    mean, var = torch.rand(2, CHANNELS)
    batch = torch.rand(2, CHANNELS, dtype=torch.float64)
    return mean, var, torch.tensor(4) if counts else None, *batch, 90


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("momentum", "counts"), [(0.1, True), (0.1, False), (None, True), (1.0, True), (0.0, True)]
)
def test_moves_as_pytorch_does(momentum, counts, dtype, monkeypatch):
    def no_plain_version(*args):
        raise AssertionError("plain")

    monkeypatch.setattr(op.torch, "lerp", no_plain_version)
    assert_as_in_pytorch(move_statistics, momentum, counts, dtype)


def test_without_momentum_and_count_nothing_moves():
    given = arguments(counts=False)
    before = [given[0].clone(), given[1].clone()]
    move_statistics(*given, None)
    assert all(torch.equal(a, b) for a, b in zip(given[:2], before, strict=True))


@pytest.mark.parametrize(("counts", "momentum"), [(True, 0.1), (False, 0.1), (True, None)])
def test_the_op_keeps_the_rules_of_ops(counts, momentum):
    torch.library.opcheck(move_statistics_op, (*arguments(counts), momentum))


@pytest.mark.parametrize("end", [True, False])
def test_nothing_outside_of_the_arguments_is_touched(end):
    mean, var, batches, *batch, values = arguments()
    running, batch = [[guarded(x, end) for x in each] for each in ((mean, var), batch)]
    assert survives(lambda: move_statistics(*running, batches, *batch, values, 0.1))
