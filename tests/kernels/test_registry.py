"""An operation is a folder and a line of the registry: whatever goes over kernels finds it there."""

import os

import pytest
import torch

from benchmarks.ahead_cases import all_cases
from benchmarks.questions.compile_ahead import compile_case, complaints, summary
from revseg.commands import doctor
from revseg.kernels.dispatch import DTYPES
from revseg.kernels.registry import KERNELS, OPERATIONS, kernels_of
from revseg.kernels.verify import compare


@pytest.fixture
def with_scale(monkeypatch):
    """As one more line in the registry would have it, for the folder tests/kernels/scaling."""
    found = kernels_of([*OPERATIONS, "tests.kernels.scaling.op"])
    assert list(found) == [*KERNELS, "scale"]
    monkeypatch.setitem(KERNELS, "scale", found["scale"])


def test_a_new_operation_is_compared_and_listed(with_scale):
    assert all(each.is_right for dtype in DTYPES for each in compare(KERNELS["scale"], "cpu", dtype))
    found = [f for f in doctor.examine(KERNELS, torch.device("cpu")) if f.kernel == "scale"]
    assert [f.dtype for f in found] == ["float32", "float16", "bfloat16"]
    assert all(f.is_right for f in found)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="a process that interprets kernels compiles none"
)
def test_a_new_operation_is_compiled_ahead(with_scale):
    cases = [case for case in all_cases() if case.operation == "scale"]
    assert {(case.numbers, case.layout) for case in cases} == {
        (numbers, layout)
        for numbers in ("float32", "float16", "bfloat16")
        for layout in ("contiguous", "channels_last")
    }
    rows = compile_case("sm_90", cases[0])
    assert [row["kernel"] for row in rows] == ["_scale_kernel"]
    assert complaints([summary(cases[:1], rows)]) == []


def test_each_operation_of_the_registry_has_its_own_name():
    names = [kernel.name for operation in OPERATIONS for kernel in kernels_of([operation]).values()]
    assert sorted(names) == sorted(KERNELS)
