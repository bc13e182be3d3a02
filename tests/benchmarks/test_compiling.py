"""torch.compile, measured as it is meant to be."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.compiling import compiling


def loss_of(x, y, weights):
    for w in weights:
        x = F.conv2d(x.relu(), w)
    return F.cross_entropy(F.interpolate(x, y.shape[-2:], mode="bilinear"), y)


@pytest.fixture
def _as_users_have_it():
    """Deterministic algorithms, on in all tests, leave the scattering to PyTorch, and the fault does not show."""
    torch.set_deterministic_debug_mode("default")
    yield
    torch.set_deterministic_debug_mode("warn")


@pytest.mark.usefixtures("_as_users_have_it")
@pytest.mark.slow  # 15 seconds of a C++ compiler
def test_gradients_through_an_upsampling_are_right():
    """All are exactly zero by torch 2.13 alone, on a CPU: the gradient of the upsampling was read before it was made."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 64, 16, 32), torch.randint(0, 19, (2, 64, 128))
    weights = [nn.Parameter(torch.randn(c, 64, 1, 1) / 8) for c in (64, 64, 64, 64, 64, 19)]
    expected = torch.autograd.grad(loss_of(x, y, weights), weights)
    with compiling(1.0):
        found = torch.autograd.grad(torch.compile(loss_of, dynamic=False)(x, y, weights), weights)
    torch.testing.assert_close(found, expected)
