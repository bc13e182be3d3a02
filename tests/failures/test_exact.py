"""Bit-for-bit inversion: what has to be the same in both passes, and where its range ends.

The number in a comment is the line of the list of failures the tests were written from.
"""

import pytest
import torch

from revseg import AdditiveCoupling, InversionError, OneSidedCoupling, ReversibleSequence
from revseg.exact.conditions import conditions
from tests.helpers import Through, assert_same_step, default_loss, needs_cuda, small_f, small_input, twin

exactly = pytest.mark.parametrize("exact", [True, "lossless"])

LAYOUTS = {
    "contiguous": lambda x: x,
    "chunk": lambda x: torch.cat((x, x), 1).chunk(2, 1)[1],
    "permuted": lambda x: x.permute(0, 1, 3, 2),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


def exact_sequence(exact, **options):
    torch.manual_seed(0)
    blocks = [AdditiveCoupling(small_f(), small_f()), OneSidedCoupling(small_f())] * 4
    return ReversibleSequence(blocks, exact=exact, **options)


@exactly
@pytest.mark.parametrize("joined", [True, False], ids=["tensor", "pair"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_functions_see_the_strides_they_saw_so_that_every_bit_is_plain(layout, joined, exact):  # 14
    """Batch norm rounds otherwise on a view than on its contiguous copy, a convolution on channels_last."""

    def view(x):
        x = LAYOUTS[layout](x)
        return x if joined else x.chunk(2, 1)

    sequence = exact_sequence(exact)
    x = small_input(2, 8, 9, 7, dtype=torch.float32)
    assert_same_step(Through(sequence, view), Through(twin(sequence), view), x, tolerance=0.0)


@pytest.mark.parametrize("size", [5e3, 1e30])
def test_values_beyond_the_grid_are_refused(size):  # 17
    sequence = exact_sequence(True)
    with pytest.raises(InversionError, match="adds without error up to 4096, got a value of"):
        sequence(small_input(dtype=torch.float32) * size)


def test_the_range_is_watched_in_every_block():  # 17
    growing = [AdditiveCoupling(lambda x: 4 * x, lambda x: 4 * x) for _ in range(6)]
    with pytest.raises(InversionError, match="AdditiveCoupling"):
        ReversibleSequence(growing, exact=True)(small_input(dtype=torch.float32))


@pytest.mark.parametrize("size", [5e3, 1e30])
def test_the_residue_has_no_range(size):  # 17
    sequence = exact_sequence("lossless")
    x = (small_input(dtype=torch.float32) * size).detach().requires_grad_()
    outputs, plain = sequence(x), twin(sequence)(y := x.detach().clone().requires_grad_())
    (outputs / size).square().sum().backward()
    (plain / size).square().sum().backward()
    assert torch.equal(x.grad, y.grad)


def changed(setting):
    if setting == "threads":
        torch.set_num_threads(2)
    else:
        torch.set_float32_matmul_precision("medium")


@exactly
@pytest.mark.parametrize("setting", ["threads", "matmul precision"])
def test_a_setting_that_changes_rounding_between_the_passes_is_refused(setting, exact):  # 15, 19
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    loss = default_loss(exact_sequence(exact)(small_input(dtype=torch.float32)))
    try:
        changed(setting)
        with pytest.raises(InversionError, match="in the forward pass and is"):
            loss.backward()
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def test_kernels_chosen_by_timing_are_refused_on_a_gpu(monkeypatch):  # 18
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with pytest.raises(RuntimeError, match=r"torch\.backends\.cudnn\.benchmark"):
        conditions(torch.device("cuda"))


@needs_cuda
@exactly
def test_deterministic_kernels_give_every_bit_on_a_gpu(exact):  # 18
    sequence = exact_sequence(exact).cuda()
    x = small_input(2, 8, 9, 7, dtype=torch.float32).detach().cuda().requires_grad_()
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        assert_same_step(sequence, twin(sequence), x, tolerance=0.0)
    finally:
        torch.backends.cudnn.deterministic = before
