"""Rounding, ranges, NaN and infinity: the right numbers or a clear error.

The number in a comment is the line of the list of failures the tests were written from. Of two
results in a low precision ours may be off by twice what plain autograd is, both held against
float64 (four times for 64 blocks); anything worse has to be refused.
"""

import copy
import math

import pytest
import torch
from torch import nn

from revseg import (
    AdditiveCoupling,
    AffineCoupling,
    InversionError,
    OneSidedCoupling,
    ReversibleSequence,
)
from tests.failures.numerical_cases import Scale, couplings
from tests.helpers import (
    Through,
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    pair_of_inputs,
    relative_error,
    run_step,
    small_f,
    small_input,
    small_sequence,
    twin,
)


class Autocast(nn.Module):
    """A module under autocast to bfloat16."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.module(x)


def smooth_sequence(*kinds):
    """Blocks without batch norm and without kinks, in double precision."""
    torch.manual_seed(0)
    blocks = []
    for kind in kinds:
        fns = [
            nn.Sequential(nn.Conv2d(4, 4 * kind.value_channels, 3, padding=1), nn.Tanh()) for _ in range(2)
        ]
        blocks.append(kind(*fns[:1]) if kind is OneSidedCoupling else kind(*fns))
    return ReversibleSequence(blocks).double()


def mean_loss(*outputs):
    return sum((y * (1 + i) * torch.linspace(-1, 1, y.shape[-1])).mean() for i, y in enumerate(outputs))


def errors_against_float64(sequence, x, dtype, wrap=lambda module: module):
    """Of one step in a lower precision: our gradients' error and that of plain autograd."""
    exact = run_step(wrap(twin(sequence)) if wrap is not Autocast else wrap_plain(twin(sequence)), x)
    low = copy.deepcopy(sequence).to(dtype)
    ours, plain = (run_step(wrap(each), x.detach().to(dtype).requires_grad_()) for each in (low, twin(low)))
    return relative_error(ours.gradients, exact.gradients), relative_error(plain.gradients, exact.gradients)


def wrap_plain(module):
    """The module under the same name as `Autocast` gives it, without autocast."""
    return Through(module, lambda x: x)


def assert_right_or_refused(sequence, x, dtype, wrap=lambda module: module, factor=2.0):
    """Gradients near those of plain autograd in the same precision, or InversionError."""
    try:
        ours, plain = errors_against_float64(sequence, x, dtype, wrap)
    except InversionError:
        return "refused"
    assert ours <= factor * plain, f"off by {ours:.2g}, plain autograd by {plain:.2g}"
    return "right"


# --- depth and precision ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coupling", "depth", "factor"),
    [
        (AdditiveCoupling, 3, 2),
        (OneSidedCoupling, 3, 2),
        (AffineCoupling, 3, 2),
        (AdditiveCoupling, 64, 4),
        (AffineCoupling, 64, 4),
    ],
)
def test_float32_gradients_are_nearly_as_good_as_plain_ones(coupling, depth, factor):  # 1
    ours, plain = errors_against_float64(small_sequence(coupling, depth), small_input(), torch.float32)
    assert ours <= factor * plain


@pytest.mark.parametrize(
    ("coupling", "depth", "bound"),
    [
        (AdditiveCoupling, 3, 1e-6),
        (AdditiveCoupling, 100, 2e-4),
        (OneSidedCoupling, 3, 1e-6),
        (OneSidedCoupling, 100, 4e-3),
    ],
)
def test_float32_drift_is_what_the_couplings_say(coupling, depth, bound):  # 1
    sequence, x = (
        small_sequence(coupling, depth).float(),
        small_input(dtype=torch.float32, requires_grad=False),
    )
    with torch.no_grad():
        found = sequence.inverse(sequence(x))
    assert (found - x).abs().max() <= bound * x.abs().max()


def test_deep_one_sided_float32_gradients_stay_within_a_thousandth():  # 1
    ours, _ = errors_against_float64(small_sequence(OneSidedCoupling, 64), small_input(), torch.float32)
    assert ours <= 1e-3


def test_one_sided_blocks_that_amplify_rounding_are_refused():  # 2
    sequence = ReversibleSequence([OneSidedCoupling(Scale(0.1)) for _ in range(60)])
    with pytest.raises(InversionError, match="save_activations=True"):
        run_step(sequence, small_input(dtype=torch.float32))


def test_one_sided_blocks_that_contract_are_right_at_the_same_depth():  # 2
    sequence = ReversibleSequence([OneSidedCoupling(Scale(-0.1)) for _ in range(60)]).double()
    ours, plain = errors_against_float64(sequence, small_input(), torch.float32)
    assert ours <= 4 * plain


@pytest.mark.parametrize("depth", [1, 3, 16])
@couplings
def test_bfloat16_functions_on_float32_streams_are_right(coupling, depth):  # 3
    sequence = small_sequence(coupling, depth)
    assert assert_right_or_refused(sequence, small_input(), torch.float32, Autocast) == "right"


@couplings
def test_bfloat16_functions_beyond_their_cliff_are_right_or_refused(coupling):  # 3
    sequence = small_sequence(coupling, 64)
    assert_right_or_refused(sequence, small_input(), torch.float32, Autocast, factor=4)


@couplings
def test_bfloat16_streams_are_right_or_refused(coupling):  # 4
    for depth in (1, 3):
        assert_right_or_refused(small_sequence(coupling, depth), small_input(), torch.bfloat16)
    assert assert_right_or_refused(small_sequence(coupling, 24), small_input(), torch.bfloat16) == "refused"


def test_bfloat16_input_is_raised_to_float32_under_autocast():  # 4
    sequence = small_sequence(depth=16).float()
    x = small_input(dtype=torch.bfloat16)
    y = Autocast(sequence)(x)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exploding_functions_are_refused(dtype):  # 5
    sequence = ReversibleSequence([AdditiveCoupling(Scale(1e3), Scale(1e3)) for _ in range(6)]).to(dtype)
    with pytest.raises(InversionError, match="amplifies rounding"):
        run_step(sequence, small_input(dtype=dtype))


@pytest.mark.parametrize(("size1", "size2"), [(1e12, 1.0), (1.0, 1e12)])
@pytest.mark.parametrize("coupling", [AdditiveCoupling, OneSidedCoupling])
def test_a_stream_absorbed_by_the_other_is_refused(coupling, size1, size2):  # 6
    pair = [
        small_input(2, 4, 6, 5, dtype=torch.float32, seed=i).detach() * s
        for i, s in enumerate((size1, size2))
    ]
    fns = (nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    block = coupling(fns[0]) if coupling is OneSidedCoupling else coupling(*fns)
    with pytest.raises(InversionError):
        run_step(ReversibleSequence(block), pair)


def test_drift_is_measured_against_each_stream_alone():  # 6
    """A small stream is lost in a huge one by 1e-4 of their joint size: tiny for one, all for the other."""
    pair = [
        small_input(2, 4, 6, 5, dtype=torch.float32, seed=i).detach() * s for i, s in enumerate((1e4, 1e-4))
    ]
    with pytest.raises(InversionError, match=r"off by \S+e-\d+ and 0\.\d+ \(first and second stream\)"):
        run_step(ReversibleSequence(OneSidedCoupling(nn.Conv2d(4, 4, 1))), pair)


@pytest.mark.parametrize("normalised", [False, True])
@couplings
def test_huge_values_are_right_or_refused(coupling, normalised):  # 7
    """Squares of 1e25 overflow in batch norm: what is then not finite in plain autograd is not here."""
    sequence = small_sequence(coupling, 3) if normalised else smooth_sequence(coupling)
    sequence, x = sequence.float(), (small_input(dtype=torch.float32) * 1e25).detach().requires_grad_()
    plain = run_step(twin(sequence), x, mean_loss)
    try:
        ours = run_step(sequence, x, mean_loss)
    except InversionError:
        return
    for name, expected in plain.gradients.items():
        found = ours.gradients[name]
        assert not found[~expected.isfinite()].isfinite().any(), name
    if not normalised:
        assert gradient_error(ours.gradients, plain.gradients) <= 1e-5


# --- the affine coupling's scale ----------------------------------------------------------------


@pytest.mark.parametrize("raw", [-math.inf, -1e6, 1e6, 1e30])
def test_affine_scales_are_bounded(raw):  # 20
    """A scale at its bound shrinks or grows a stream by 5 % a block: a factor of 25 after 64."""

    class Extreme(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return torch.cat((torch.full_like(x, raw), self.conv(x).tanh()), 1)

    torch.manual_seed(0)
    sequence = ReversibleSequence([AffineCoupling(Extreme(), Extreme()) for _ in range(64)]).double()
    assert_same_step(sequence, twin(sequence), small_input())
    ours, _ = errors_against_float64(sequence, small_input(), torch.float32)
    assert ours <= 1e-4


def test_affine_functions_of_too_few_channels_are_refused():  # 20
    sequence = ReversibleSequence(AffineCoupling(small_f(), small_f())).double()
    with pytest.raises(ValueError, match="needs a function value of 8 channels"):
        sequence(small_input())


# --- the drift check itself ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("zero", [(0,), (1,), (0, 1)])
def test_a_stream_of_zeros_raises_no_false_alarm(zero, dtype):  # 21
    pair = [small_input(2, 4, 6, 5, dtype=dtype, seed=i).detach() for i in range(2)]
    for i in zero:
        pair[i].zero_()
    sequence = smooth_sequence(AdditiveCoupling, OneSidedCoupling, AffineCoupling).to(dtype)
    assert_same_step(sequence, twin(sequence), [x.requires_grad_() for x in pair])


def test_the_drift_check_keeps_no_view_of_the_input():  # 21
    """The samples of a float64 input are already float64: they have to be copied all the same."""
    sequence, pair = small_sequence(), pair_of_inputs()
    plain = run_step(twin(sequence), pair)
    y = sequence(pair)
    with torch.no_grad():
        for x in pair:
            x.mul_(1000)
    default_loss(*y).backward()
    gradients = {f"input {i}": x.grad for i, x in enumerate(pair)} | gradients_of(sequence)
    assert gradient_error(gradients, plain.gradients) <= 1e-9


def test_the_drift_check_warns_or_is_silent_when_told_so():  # 21
    blocks = [OneSidedCoupling(Scale(0.1)) for _ in range(60)]
    with pytest.warns(RuntimeWarning, match="reconstructed input is off by"):
        run_step(ReversibleSequence(blocks, check="warn"), small_input(dtype=torch.float32))
    run_step(ReversibleSequence(blocks, check=None), small_input(dtype=torch.float32))
