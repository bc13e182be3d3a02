"""Every shape and layout, and what may differ between the two runs: the right numbers or a clear error.

The number in a comment is the line of the list of failures the tests were written from.
"""

import math

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
    Squeeze,
)
from tests.helpers import (
    Through,
    all_couplings,
    assert_same_step,
    default_loss,
    gradient_error,
    gradients_of,
    needs_cuda,
    relative_error,
    run_step,
    small_f,
    small_input,
    small_sequence,
    twin,
)

couplings = pytest.mark.parametrize("coupling", [AdditiveCoupling, OneSidedCoupling, AffineCoupling])


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
    ],
)
def test_shapes_without_two_streams_are_refused(shape, message):  # 12
    for sequence in (small_sequence(), small_sequence(save_activations=True)):
        with pytest.raises(ValueError, match=message):
            sequence(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (0, 8, 1, 1)])
def test_empty_batches_are_those_of_plain_pytorch(shape):  # 12
    for make in (lambda: nn.Conv2d(4, 4, 1), lambda: nn.GroupNorm(2, 4), nn.Tanh):
        ours = ReversibleSequence(AdditiveCoupling(make(), make()), OneSidedCoupling(make())).double()
        assert_same_step(ours, twin(ours), torch.zeros(shape, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("down", [Squeeze, HaarDownsample])
def test_odd_maps_are_refused_by_downsampling(down):  # 12
    with pytest.raises(ValueError, match="of even sizes"):
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
