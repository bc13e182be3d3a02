"""Numbers that are none: infinity and NaN stay where plain autograd has them, and count in nothing else."""

import math

import pytest
import torch
from torch import nn

from revseg import (
    AdditiveCoupling,
    OneSidedCoupling,
    ReversibleSequence,
)
from tests.failures.numerical_cases import Scale, couplings
from tests.helpers import (
    default_loss,
    run_step,
    small_input,
    small_sequence,
    twin,
)


def test_overflow_to_infinity_gives_no_finite_gradient():  # 5
    sequence = ReversibleSequence([AdditiveCoupling(Scale(1e6), Scale(1e6)) for _ in range(8)])
    x = small_input(dtype=torch.float32)
    assert_finite_only_where_plain_is(run_step(sequence, x), run_step(twin(sequence), x))


def assert_finite_only_where_plain_is(ours, plain):
    assert not all(g is None or g.isfinite().all() for g in plain.gradients.values())
    for name, expected in plain.gradients.items():
        found = ours.gradients[name]
        assert (found is None) == (expected is None)
        if expected is not None:
            assert not found[~expected.isfinite()].isfinite().any(), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["input", "weight"])
@couplings
def test_nan_and_infinity_give_no_finite_gradient(coupling, where, value):  # 8
    sequence, x = small_sequence(coupling, 2), small_input()
    with torch.no_grad():
        target = x if where == "input" else next(sequence.parameters())
        target.flatten()[3] = value
    ours, plain = run_step(sequence, x), run_step(twin(sequence), x)
    assert_finite_only_where_plain_is(ours, plain)


def test_nan_stays_where_it_is_in_plain_autograd():  # 8
    """Without batch norm a NaN pixel spoils its neighbours alone."""
    fns = [nn.Conv2d(4, 4, 3, padding=1).double() for _ in range(4)]
    sequence = ReversibleSequence(AdditiveCoupling(*fns[:2]), OneSidedCoupling(fns[2]))
    x = small_input(2, 8, 9, 9)
    with torch.no_grad():
        x[0, 0, 0, 0] = math.nan
    ours, plain = run_step(sequence, x), run_step(twin(sequence), x)
    torch.testing.assert_close(ours.gradients, plain.gradients, equal_nan=True)


def test_a_nan_batch_counts_once_in_the_running_statistics():  # 9
    sequence, x = small_sequence(), small_input()
    reference = twin(sequence)
    run_step(sequence, x), run_step(reference, x)
    bad = x.detach().clone()
    bad[0, 0, 0, 0] = math.nan
    ours, plain = run_step(sequence, bad), run_step(reference, bad)
    torch.testing.assert_close(ours.buffers, plain.buffers, equal_nan=True)


def test_nan_in_the_second_run_does_not_reach_the_running_statistics():  # 9
    sequence, x = small_sequence(), small_input()
    y = sequence(x)
    before = {name: b.clone() for name, b in sequence.named_buffers()}
    y.data.fill_(math.nan)  # what a version counter cannot see
    default_loss(y).backward()
    torch.testing.assert_close(dict(sequence.named_buffers()), before, rtol=0, atol=0)
