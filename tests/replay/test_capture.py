"""What changes while a CUDA graph is captured, simulated; the capture itself is in tests/gpu."""

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, ReversibleSequence
from revseg.engine.drift import _pending, report
from revseg.replay.context import drawing_refused_in_capture, random_state
from tests.helpers import assert_same_step, small_f, small_input, small_sequence, twin


@pytest.fixture
def capturing(monkeypatch):
    for place in ("replay.context", "engine.drift"):
        monkeypatch.setattr(f"revseg.{place}.is_capturing", lambda: True)


def test_nothing_is_captured_here():
    with drawing_refused_in_capture():
        torch.rand(2)


def test_a_step_is_that_of_the_plain_twin(capturing):
    sequence = small_sequence()
    assert_same_step(sequence, twin(sequence), small_input())


def test_functions_that_draw_are_refused(capturing):
    f = nn.Sequential(small_f(), nn.Dropout(0.5))
    sequence = ReversibleSequence(AdditiveCoupling(f, small_f())).double()
    with pytest.raises(
        RuntimeError, match="draws random numbers inside of a reversible block while a CUDA graph"
    ):
        sequence(small_input())
    sequence.eval()(small_input())  # where dropout draws nothing


def test_only_the_state_of_the_cpu_is_read(capturing):
    found = random_state([torch.device("cpu"), torch.device("cuda", 0)])
    assert [device.type for device, _ in found] == ["cpu"]


def test_nothing_is_judged(capturing):
    report(torch.ones(2), lambda values: pytest.fail("judged"))
    assert not _pending
