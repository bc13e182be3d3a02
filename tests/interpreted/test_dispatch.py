"""The rule by which an operation runs as a kernel."""

import pytest
import torch

from revseg.kernels.dispatch import forced, has_kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_interpreter_stands_in_for_a_gpu(dtype):
    assert has_kernel(torch.ones(2, dtype=dtype))


def test_double_precision_has_no_kernel():
    assert not has_kernel(torch.ones(2, dtype=torch.float64))


def test_tensors_without_values_have_no_kernel():
    assert not has_kernel(torch.ones(2, device="meta"))


def test_kernels_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("REVSEG_KERNELS", "0")
    assert not has_kernel(torch.ones(2))


def test_without_the_interpreter_a_cpu_has_no_kernel_unless_forced(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not has_kernel(torch.ones(2))
    with forced():
        assert has_kernel(torch.ones(2))
    assert not has_kernel(torch.ones(2))
