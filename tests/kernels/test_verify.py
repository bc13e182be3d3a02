"""The rule by which an operation is right, on operations that are right, wrong, and less exact."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from revseg.kernels.bn_act import op as bn_act
from revseg.kernels.dispatch import DTYPES, has_kernel
from revseg.kernels.registry import KERNELS
from revseg.kernels.verify import Kernel, compare, converted
from tests.kernels.scaling.op import SCALE, example_inputs, reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("name", KERNELS)
def test_every_operation_is_right(name, dtype):
    assert all(each.is_right for each in compare(KERNELS[name], "cpu", dtype))


@pytest.mark.parametrize("name", KERNELS)
def test_examples_have_odd_sizes_and_come_out_the_same_twice(name):
    state = torch.get_rng_state()
    calls = [KERNELS[name].example("cpu", torch.float32) for _ in range(2)]
    a, b = ([x for x in call if isinstance(x, Tensor)] for call in calls)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert any(size % 2 for x in a for size in x.shape[-2:])
    assert torch.equal(torch.get_rng_state(), state)


@dtypes
@pytest.mark.parametrize("name", KERNELS)
def test_an_operation_off_by_a_little_is_wrong(name, dtype):
    kernel = KERNELS[name]

    def off(*args):
        results = kernel.function(*args)
        results = [results] if isinstance(results, Tensor) else results
        far = 1 + 8 * torch.finfo(dtype).eps
        return [x * far if x.is_floating_point() else x + (x == x.max()) for x in results if x is not None]

    assert not all(each.is_right for each in compare(replace(kernel, function=off), "cpu", dtype))


def test_gradients_are_compared_too():
    def function(x, factor):
        return reference(x, factor).detach() + 0 * x  # right but for its gradient

    kernel = Kernel(function, reference, example_inputs, differentiable=(0,))
    output, gradient = compare(kernel, "cpu", torch.float32)
    assert output.is_right
    assert not gradient.is_right
    assert gradient.result == "gradient 0"


def test_nan_is_wrong():
    kernel = replace(SCALE, function=lambda x, factor: reference(x, factor) * float("nan"))
    assert not compare(kernel, "cpu", torch.float32)[0].is_right


def test_results_of_another_shape_are_an_error():
    kernel = replace(SCALE, function=lambda x, factor: reference(x, factor)[0])
    with pytest.raises(ValueError, match=r"expected results of shapes .*\[2, 3, 5, 7\].*, got .*\[3, 5, 7\]"):
        compare(kernel, "cpu", torch.float32)


def test_arguments_are_converted_inside_of_their_containers():
    @dataclass(frozen=True)
    class Options:
        weight: Tensor
        rate: float

    norm = bn_act.example_inputs("cpu", torch.float32)[1]
    given = ([torch.ones(2)], Options(torch.ones(1), 0.5), torch.ones(2, dtype=torch.int64), norm, (3, 5))
    found = converted(given, torch.float64)
    assert found[0][0].dtype == found[1].weight.dtype == found[3].weight.dtype == torch.float64
    assert found[2].dtype == torch.int64
    assert (found[1].rate, found[4]) == (0.5, (3, 5))


def test_the_reference_runs_without_kernels(monkeypatch):
    monkeypatch.setattr("revseg.kernels.dispatch.is_interpreting", lambda: True)  # a CPU then has kernels
    seen = []

    def seeing(x, factor):
        seen.append(has_kernel(x))
        return reference(x, factor)

    compare(Kernel(seeing, reference, example_inputs), "cpu", torch.float32)
    compare(Kernel(reference, seeing, example_inputs), "cpu", torch.float32)
    assert seen == [True, False, False]


def test_integers_count_by_how_many_differ():
    def labels(x):
        return (x > 0).to(torch.uint8)

    def wrong(x):
        found = labels(x)
        found[0, 0, 0, :7] ^= 1
        return found

    kernel = Kernel(wrong, labels, lambda device, dtype: example_inputs(device, dtype)[:1])
    (found,) = compare(kernel, "cpu", torch.float32)
    assert found.error == pytest.approx(7 / 210)
    assert found.bound == 0
