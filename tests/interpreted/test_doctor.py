"""The contract of kernels and `revseg doctor` in the interpreter."""

from dataclasses import replace

import pytest
import torch

from revseg.commands import doctor
from revseg.kernels.asymmetric_conv import op as asymmetric_conv
from revseg.kernels.dispatch import DTYPES
from revseg.kernels.registry import KERNELS
from revseg.kernels.verify import compare
from tests.kernels.scaling.op import SCALE, scale

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_kernel_is_compared_as_it_runs(dtype):
    assert SCALE.is_live(SCALE.example_inputs("cpu", dtype))
    assert all(each.is_right for each in compare(SCALE, "cpu", dtype))


def test_the_reference_in_float64_is_no_kernel():
    assert not SCALE.is_live(SCALE.example_inputs("cpu", torch.float64))


def test_doctor_says_that_the_interpreter_runs():
    found = doctor.examine({"scale": SCALE}, CPU)
    assert [each.runs_as for each in found] == ["interpreter"] * len(DTYPES)


def test_doctor_tells_an_operation_without_kernel(monkeypatch):
    assert doctor.runs_as(KERNELS["relaid"], CPU, torch.float32) == "PyTorch"
    monkeypatch.setenv("REVSEG_KERNELS", "0")
    assert doctor.runs_as(SCALE, CPU, torch.float32) == "PyTorch"


@pytest.mark.parametrize("name", ["asymmetric_conv", "asymmetric_conv_backward"])
def test_doctor_asks_an_operation_that_has_a_rule_of_its_own(monkeypatch, name):
    assert doctor.runs_as(KERNELS[name], CPU, torch.float32) == "interpreter"
    monkeypatch.setattr(asymmetric_conv, "CHANNELS", range(16, 129))
    assert doctor.runs_as(KERNELS[name], CPU, torch.float32) == "PyTorch"


def test_doctor_finds_a_wrong_kernel():
    wrong = replace(SCALE, function=lambda x, factor: scale(x, 1.1 * factor))
    assert not any(each.is_right for each in doctor.examine({"scale": wrong}, CPU))
