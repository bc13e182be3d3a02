"""Exact modes: where they end, what they need to stay the same, and that both are said."""

import pytest
import torch
from torch import nn

from revseg import (
    AdditiveCoupling,
    AffineCoupling,
    HaarDownsample,
    InversionError,
    OneSidedCoupling,
    ReversibleSequence,
)
from revseg.exact.grid import snap
from tests.exact.twins import assert_exact, blocks_of, exact_modes, float_input, networks
from tests.helpers import modes, run_step, small_block, small_f

GRID = 2.0**-12


def trained(sequence, x):
    run_step(sequence, x.requires_grad_())


# --- range and resolution of the grid ------------------------------------------------------------


def test_values_are_rounded_to_multiples_of_the_step():
    x = torch.tensor([0.3, -0.3, 1e-5, GRID / 2, 1.5 * GRID, 4095.9999, -4096.0, float("inf"), float("nan")])
    torch.testing.assert_close(snap(x), (x / GRID).round() * GRID, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(snap(x.double()[:7]), (x.double()[:7] * 2**41).round() / 2**41)


@pytest.mark.parametrize(
    ("value", "added"),
    [(4096.0, -1.0), (4095.0, 1 - GRID), (-4000.0, -96.0), (4000.0, -8000.0), (4095.0, 1.0)],
)
def test_values_up_to_the_limit_are_exact(value, added):
    blocks = [AdditiveCoupling(lambda x: torch.full_like(x, added), lambda x: -x.tanh() * value / 4096)]
    assert_exact(blocks, torch.full((2, 8, 3, 3), value, requires_grad=True), True)


@modes
@pytest.mark.parametrize(("value", "added"), [(4096.0, 1.0), (4095.0, 1.001), (-4000.0, -97.0), (0.0, 1e30)])
def test_beyond_the_limit_the_block_is_named(value, added, options):
    blocks = [small_block(), AdditiveCoupling(lambda x: torch.full_like(x, added), nn.Tanh())]
    for f in (blocks[0].f, blocks[0].g):
        f.register_forward_hook(lambda module, args, y: 0 * y)
    sequence = ReversibleSequence(blocks, exact=True, **options)
    with pytest.raises(
        InversionError,
        match=r"^block 1 \(AdditiveCoupling\), f: exact=True adds without error up to 4096, got a value of "
        r'\S+; scale the input or normalize inside the functions, or use exact="lossless"$',
    ):
        trained(sequence, torch.full((2, 8, 3, 3), value))


def test_an_input_beyond_the_limit_is_named():
    sequence = ReversibleSequence(small_block(), exact=True)
    with pytest.raises(InversionError, match=r"^the input: exact=True .* got a value of 5000;"):
        trained(sequence, torch.full((2, 8, 3, 3), 5000.0))


def test_a_sum_that_is_rounded_to_the_limit_is_beyond_it():
    # 4096 + 2^-12 is no float32 and becomes 4096; taking 2 steps back then gives another number.
    blocks = [AdditiveCoupling(lambda x: torch.full_like(x, 2 * GRID), torch.zeros_like)]
    with pytest.raises(InversionError, match="not bit for bit"):
        trained(ReversibleSequence(blocks, exact=True), torch.full((2, 8, 3, 3), 4096 - GRID))


@exact_modes
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_values_that_are_not_finite_pass_as_in_plain_autograd(bad, exact):
    x = float_input().detach()
    x[0, 1, 2, 3] = bad
    assert_exact([small_block(), small_block(OneSidedCoupling)], x.requires_grad_(), exact)


@pytest.mark.parametrize("exact", [True, "lossless"])
def test_overflow_of_float16_reaches_the_gradients_for_the_scaler_to_see(exact):
    f = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    nn.init.constant_(f[0].weight, 1e4)
    ours, plain = networks([AdditiveCoupling(f, small_f())], exact, torch.float16)
    found = [run_step(net, float_input()).gradients for net in (ours, plain)]
    finite = [{name: bool(g.isfinite().all()) for name, g in each.items()} for each in found]
    assert finite[0] == finite[1]
    assert not all(finite[0].values())


def test_inverse_is_exact_on_the_grid_and_says_where_it_ends():
    sequence = ReversibleSequence(blocks_of(AdditiveCoupling, 30), exact=True).eval()
    x = snap(float_input().detach())
    assert torch.equal(sequence.inverse(sequence(x)), x)
    far = ReversibleSequence(
        AdditiveCoupling(lambda x: torch.full_like(x, -3000.0), torch.zeros_like), exact=True
    )
    with pytest.raises(InversionError, match=r"block 0 \(AdditiveCoupling\), f: .* got a value of 5000"):
        far.inverse(torch.full((2, 8, 3, 3), 2000.0))
    with pytest.raises(InversionError, match=r"the output: .* got a value of 4100"):
        far.inverse(torch.full((2, 8, 3, 3), 4100.0))


# --- what is refused -----------------------------------------------------------------------------


class Halved(AdditiveCoupling):
    """Inherits `additive`, and adds no longer."""

    @classmethod
    def couple(cls, x, h):
        return x + 0.5 * h

    @classmethod
    def uncouple(cls, y, h):
        return y - 0.5 * h


def test_couplings_that_do_not_add_are_refused_by_the_grid():
    for coupling in (AffineCoupling, Halved):
        with pytest.raises(
            ValueError,
            match=rf"^{coupling.__name__}, f: exact=True undoes additions only; use an additive coupling \(one of "
            r'your own says additive = True where it defines couple\), or exact="lossless", which takes any$',
        ):
            ReversibleSequence(small_block(coupling), exact=True)
    assert_exact([small_block(Halved)], float_input(), "lossless")


@exact_modes
def test_maps_that_round_are_refused(exact):
    with pytest.raises(ValueError, match=r"^HaarDownsample cannot be undone bit for bit, .*; use Squeeze$"):
        ReversibleSequence(small_block(), HaarDownsample(), exact=exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_grid_refuses_streams_of_half_precision(dtype):
    with pytest.raises(TypeError, match=f"exact=True needs float32 or float64 streams, got {dtype}"):
        ReversibleSequence(small_block(), exact=True).to(dtype)(float_input().to(dtype))


@pytest.mark.parametrize("exact", [1, 0, "grid", None])
def test_values_of_the_option(exact):
    with pytest.raises(ValueError, match='expected exact to be True, False or "lossless"'):
        ReversibleSequence(small_block(), exact=exact)


def test_uncouple_must_keep_the_dtype():
    class Wide(AdditiveCoupling):
        additive = False  # or it would be undone by a subtraction, whatever `uncouple` says

        @classmethod
        def uncouple(cls, y, h):
            return y.double() - h

    sequence = ReversibleSequence(small_block(Wide), exact="lossless")
    with pytest.raises(
        ValueError, match=r"uncouple must give back a stream \[2, 4, 6, 5\] float32 on cpu, got"
    ):
        sequence(float_input())
