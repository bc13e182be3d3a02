"""Rounding, ranges, shapes and layouts: the right numbers or a clear error.

The number in a comment is the line of the list of failures the tests were written from. Of two
results in a low precision ours may be off by twice what plain autograd is, both held against
float64 (four times for 64 blocks); anything worse has to be refused.
"""

import copy
import math

import pytest
import torch
from helpers import (
    all_couplings,
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    relative_error,
    run_step,
    small_f,
    small_input,
    small_sequence,
    twin,
)
from torch import nn

from revseg import (
    AdditiveCoupling,
    AffineCoupling,
    HaarDownsample,
    InversionError,
    OneSidedCoupling,
    ReversibleSequence,
    Squeeze,
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
couplings = pytest.mark.parametrize("coupling", [AdditiveCoupling, OneSidedCoupling, AffineCoupling])


class Scale(nn.Module):
    """h = factor * x, the factor a parameter."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x):
        return self.factor * x


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


class Through(nn.Module):
    """A module that reads a view of its input."""

    def __init__(self, module, view):
        super().__init__()
        self.module, self.view = module, view

    def forward(self, x):
        return self.module(self.view(x))


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


def test_overflow_to_infinity_gives_no_finite_gradient():  # 5
    sequence = ReversibleSequence([AdditiveCoupling(Scale(1e6), Scale(1e6)) for _ in range(8)])
    x = small_input(dtype=torch.float32)
    assert_finite_only_where_plain_is(run_step(sequence, x), run_step(twin(sequence), x))


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


# --- NaN and infinity ---------------------------------------------------------------------------


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


# --- shapes, layouts, dtypes --------------------------------------------------------------------


def test_one_value_per_channel_is_refused_by_batch_norm_as_in_plain():  # 10
    sequence, x = small_sequence(), small_input(1, 8, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel") as plain:
        twin(sequence)(x)
    with pytest.raises(ValueError, match="more than 1 value per channel") as ours:
        sequence(x)
    assert str(ours.value) == str(plain.value)


def test_bias_before_batch_norm_has_only_noise_for_a_gradient():  # 11
    """Why tolerances here are relative to the whole gradient: no relative one fits a true zero."""
    sequence = small_sequence()
    ours, plain = assert_same_step(sequence, twin(sequence), small_input())
    name = "blocks.0.f.0.bias"
    for result in (ours, plain):
        assert result.gradients[name] is not None
        assert gradient_error({name: result.gradients[name]}, {name: torch.zeros(4).double()}) < 1e-13


@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 7), (1, 2, 3, 1), (3, 6, 5, 7), (2, 6, 3, 5, 1)])
@couplings
def test_odd_sizes_of_any_number_of_dimensions_are_right(coupling, shape):  # 12
    half = shape[1] // 2

    def fn():
        conv = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
        options = {} if len(shape) == 2 else {"kernel_size": 3, "padding": 1}
        return nn.Sequential(conv(half, half * coupling.value_channels, **options), nn.Tanh())

    fns = [fn()] if coupling is OneSidedCoupling else [fn(), fn()]
    sequence = ReversibleSequence(coupling(*fns)).double()
    assert_same_step(sequence, twin(sequence), small_input(*shape))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((8,), r"expected a tensor \[N, C, ...\], got \[8\]"),
        ((2, 7, 4, 4), "even number of channels, got 7"),
        ((0, 8, 4, 4), r"at least one value in each stream, got \[0, 4, 4, 4\]"),
        ((2, 0, 4, 4), "at least one value"),
        ((2, 8, 0, 4), "at least one value"),
    ],
)
def test_shapes_without_two_streams_are_refused(shape, message):  # 12
    for sequence in (small_sequence(), small_sequence(save_activations=True)):
        with pytest.raises(ValueError, match=message):
            sequence(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("down", [Squeeze, HaarDownsample])
def test_odd_maps_are_refused_by_downsampling(down):  # 12
    with pytest.raises(ValueError, match="even height and width"):
        ReversibleSequence(down(), small_sequence(channels=32)[0])(small_input(2, 8, 6, 5))


LAYOUTS = {
    "chunk": lambda x: torch.cat((x, x), 1).chunk(2, 1)[1],
    "permuted": lambda x: x.permute(0, 1, 3, 2),
    "batch_inside": lambda x: x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded_channels": lambda x: x[:, :1].expand(-1, 8, -1, -1),
    "strided": lambda x: x[..., ::2, 1::2],
    "flipped_window": lambda x: x.flip(2)[..., 1:, 1:],
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("as_pair", [False, True], ids=["tensor", "pair"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_input_is_right(layout, as_pair):  # 13
    def view(x):
        x = LAYOUTS[layout](x)
        return x.chunk(2, 1) if as_pair else x

    sequence = all_couplings()
    assert_same_step(Through(sequence, view), Through(twin(sequence), view), small_input())


def test_another_number_of_threads_in_the_backward_pass_is_right():  # 15
    sequence, x = small_sequence(), small_input()
    plain = run_step(twin(sequence), x)
    y = sequence(x)
    try:
        torch.set_num_threads(2)
        default_loss(y).backward()
    finally:
        torch.set_num_threads(1)
    gradients = {"input 0": x.grad, **gradients_of(sequence)}
    assert gradient_error(gradients, plain.gradients) <= 1e-9


@pytest.mark.parametrize(
    "second",
    [torch.zeros(2, 4, 6, 5), torch.zeros(2, 3, 6, 5).double(), torch.zeros(1, 4, 6, 5).double()],
    ids=["dtype", "channels", "batch"],
)
def test_streams_that_differ_are_refused(second):  # 16
    with pytest.raises(ValueError, match="two streams of one shape, dtype and device"):
        small_sequence()((torch.zeros(2, 4, 6, 5).double(), second))


@pytest.mark.parametrize(
    "x", [torch.ones(2, 8, 4, 4, dtype=torch.int64), torch.ones(2, 8, dtype=torch.complex64)]
)
def test_streams_without_a_real_gradient_are_refused(x):  # 16
    with pytest.raises(TypeError, match="floating-point streams"):
        small_sequence()(x)


@pytest.mark.parametrize(
    ("fn", "kind", "message"),
    [
        (lambda x: x[:1].unsqueeze(0).expand(3, 2, -1, -1, -1), ValueError, "keep the stream's shape"),
        (lambda x: x.double(), ValueError, r"float32 on cpu, got \[2, 4, 6, 5\] float64"),
        (lambda x: (x, x), TypeError, "one tensor, got tuple"),
        (lambda x: None, TypeError, "one tensor, got NoneType"),
    ],
    ids=["larger", "dtype", "tuple", "none"],
)
@pytest.mark.parametrize("plain", [False, True], ids=["reversible", "plain"])
def test_values_that_change_the_stream_are_refused_by_name(fn, kind, message, plain):  # 16
    sequence = ReversibleSequence(
        small_sequence()[0], AdditiveCoupling(small_f(), fn), save_activations=plain
    ).float()
    with pytest.raises(kind, match=message) as error:
        sequence(small_input(dtype=torch.float32))
    assert "AdditiveCoupling" in str(error.value)
    assert plain or "block 1 (AdditiveCoupling), g" in str(error.value)


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (1, 4, 1, 1), (4, 1, 1), (1,)])
def test_values_smaller_than_the_stream_are_broadcast_as_in_plain(shape):  # 16
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            z = self.conv(x).tanh().mean((2, 3), keepdim=True)
            return (
                z
                if shape == (2, 4, 1, 1)
                else z.mean(0, keepdim=True).flatten()[: math.prod(shape)].view(shape)
            )

    sequence = ReversibleSequence(AdditiveCoupling(Pooled(), Pooled()), OneSidedCoupling(Pooled())).double()
    assert_same_step(sequence, twin(sequence), small_input())


# --- algorithms that may differ between the two runs --------------------------------------------


@needs_cuda
def test_autotuned_convolutions_are_right():  # 18
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        sequence, x = small_sequence(depth=8).float().cuda(), small_input(dtype=torch.float32).cuda().detach()
        assert_same_step(sequence, twin(sequence), x.requires_grad_(), tolerance=1e-3)
    finally:
        torch.backends.cudnn.benchmark = before


def linear_sequence():
    torch.manual_seed(0)
    return ReversibleSequence([AdditiveCoupling(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(3)])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_a_precision_lowered_before_the_backward_pass_is_right_or_refused(device):  # 19
    """No error is larger than that of plain autograd at the lower precision throughout."""
    sequence = linear_sequence().to(device)
    x = small_input(32, 32, dtype=torch.float32).detach().to(device).requires_grad_()
    exact = run_step(twin(sequence).double(), x.detach().double().requires_grad_())
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        y = sequence(x)
        torch.set_float32_matmul_precision("medium")
        plain = run_step(twin(sequence), x)
        try:
            default_loss(y).backward()
        except InversionError:
            return
    finally:
        torch.set_float32_matmul_precision(before)
    ours = {"input 0": x.grad, **gradients_of(sequence)}
    assert relative_error(ours, exact.gradients) <= 2 * relative_error(plain.gradients, exact.gradients)


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
    sequence, x = small_sequence(), small_input()
    plain = run_step(twin(sequence), x)
    y = sequence(x)
    with torch.no_grad():
        x.mul_(1000)
    default_loss(y).backward()
    assert gradient_error({"input 0": x.grad, **gradients_of(sequence)}, plain.gradients) <= 1e-9


def test_the_drift_check_warns_or_is_silent_when_told_so():  # 21
    blocks = [OneSidedCoupling(Scale(0.1)) for _ in range(60)]
    with pytest.warns(RuntimeWarning, match="reconstructed input is off by"):
        run_step(ReversibleSequence(blocks, check="warn"), small_input(dtype=torch.float32))
    run_step(ReversibleSequence(blocks, check=None), small_input(dtype=torch.float32))
