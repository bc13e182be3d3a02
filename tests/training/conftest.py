"""Runs without what is slow in them and has tests of its own."""

import pytest
import torch

from tests.training.tiny import quickly


@pytest.fixture
def quick(monkeypatch):
    """Leaves out predicting, measuring and drawing; the number of threads is put back."""
    threads = torch.get_num_threads()
    quickly(monkeypatch)
    yield
    torch.set_num_threads(threads)
