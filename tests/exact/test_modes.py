"""Exact modes: bit for bit the plain twin, outputs, every gradient and every buffer, also after training.

`exact=True` is held against its own plain twin, which rounds to the same grid, "lossless" against
the ordinary network of floats.
"""

import pytest
import torch
from torch import nn

from revseg import AdditiveCoupling, AffineCoupling, Coupling, OneSidedCoupling, ReversibleSequence
from tests.exact.twins import (
    FUNCTIONS,
    Branches,
    ThreeUpdates,
    assert_exact,
    blocks_of,
    dtypes,
    exact_modes,
    float_input,
    networks,
)
from tests.helpers import Averaging, assert_bitwise, run_step, small_f

# --- depth, couplings, precision, training -------------------------------------------------------


@exact_modes
@dtypes
@pytest.mark.parametrize("coupling", [AdditiveCoupling, OneSidedCoupling])
@pytest.mark.parametrize("depth", [1, 3, 100])
def test_one_step_is_that_of_the_plain_twin(coupling, depth, dtype, exact):
    assert_exact(blocks_of(coupling, depth), float_input(), exact, dtype)


@exact_modes
@dtypes
@pytest.mark.parametrize(
    ("coupling", "depth"), [(AdditiveCoupling, 1), (AdditiveCoupling, 3), (OneSidedCoupling, 3)]
)
def test_twenty_steps_of_training_end_with_the_same_weights(coupling, depth, dtype, exact):
    assert_same_training(*networks(blocks_of(coupling, depth), exact, dtype))


@exact_modes
@pytest.mark.parametrize(("depth", "dtype", "steps"), [(30, None, 20), (100, torch.bfloat16, 6)])
def test_steps_of_training_a_deep_network(depth, dtype, steps, exact):
    blocks = [
        OneSidedCoupling(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.PReLU(4)))
        for _ in range(depth)
    ]
    assert_same_training(*networks(blocks, exact, dtype), steps)


def assert_same_training(ours, plain, steps=20):
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-2) for net in (ours, plain)]
    before = [p.detach().clone() for p in ours.parameters()]
    for step in range(steps):
        x = float_input(2, 8, 5, 7, seed=step)
        results = [run_step(net, x, seed=step) for net in (ours, plain)]
        for optimizer in optimizers:
            optimizer.step()
    assert_bitwise(*results)
    for p, q, old in zip(ours.parameters(), plain.parameters(), before, strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, old)


def test_lossless_outputs_are_those_of_weights_trained_without_it():
    plain = ReversibleSequence(blocks_of(AdditiveCoupling, 3), save_activations=True)
    run_step(plain, float_input())
    ours = ReversibleSequence(blocks_of(AdditiveCoupling, 3), exact="lossless")
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(ours.eval()(float_input()), plain.eval()(float_input()))


def test_the_default_mode_would_fail_these_tests():
    ours, plain = networks(blocks_of(AdditiveCoupling, 3), False)
    with pytest.raises(AssertionError, match="not equal"):
        assert_bitwise(run_step(ours, float_input()), run_step(plain, float_input()))


# --- functions and couplings -----------------------------------------------------------------------


@exact_modes
@dtypes
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_functions(function, dtype, exact):
    # "input read three times" and "broadcast value" once were off by rounding: gradients that meet
    # in one tensor were added in another order than autograd's, and summed after the cast to half.
    blocks = [AdditiveCoupling(function(), small_f()), OneSidedCoupling(function())]
    assert_exact(blocks, float_input(), exact, dtype)


@exact_modes
@dtypes
def test_weights_used_four_times(dtype, exact):
    f = Branches()
    ours, plain = networks([AdditiveCoupling(f, f), AdditiveCoupling(f, f)], exact)
    x = float_input()
    results = []
    for net in (ours, plain):  # autocast's cache would add gradients up in half precision
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
            results.append(run_step(net, x))
    assert_bitwise(*results)


class Unmoved(Coupling):
    """Ignores the value, and gives back the very tensor it was given."""

    @classmethod
    def couple(cls, x, h):
        return x

    @classmethod
    def uncouple(cls, y, h):
        return y


@exact_modes
@dtypes
def test_additive_couplings_of_ones_own(dtype, exact):
    assert_exact([ThreeUpdates(small_f(), Branches()) for _ in range(3)], float_input(), exact, dtype)


@dtypes
@pytest.mark.parametrize("coupling", [AffineCoupling, Averaging, Unmoved])
@pytest.mark.parametrize("depth", [1, 20])
def test_lossless_undoes_any_coupling(coupling, depth, dtype):
    assert_exact(blocks_of(coupling, depth), float_input(), "lossless", dtype)


class Twice(nn.Module):
    """Uses its convolution two times."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(self.conv(x).tanh()).tanh()


@exact_modes
def test_gradients_of_what_several_steps_use_several_times_add_up_use_by_use(exact):
    torch.manual_seed(0)
    f = Twice()
    assert_exact([AdditiveCoupling(f, f) for _ in range(3)], float_input(2, 8, 9, 9), exact)
