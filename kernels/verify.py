"""An operation against its reference: the rule that decides whether it is right.

Each runs on the same numbers, and a third run, the reference in float64, says how far off both are.
An operation is right if its error is at most twice that of plain PyTorch in the same dtype. So no
tolerance is written down anywhere: it is what the numbers, the dtype and the device make of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revseg.kernels.dispatch import has_kernel, plain
from revseg.kernels.precision import widest

Device = str | torch.device


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An operation, what it means, and a small call of it.

    Attributes:
        function: The operation.
        reference: Plain PyTorch with the same arguments and results.
        example_inputs: Called with a device and a dtype; the arguments of a call with odd sizes.
        differentiable: Places of the arguments whose gradients autograd gives.
        rule: Called with these arguments; whether they run in Triton where their first tensor's like do.
    """

    function: Callable[..., Any]
    reference: Callable[..., Any]
    example_inputs: Callable[[torch.device, torch.dtype], tuple[Any, ...]]
    differentiable: tuple[int, ...] = ()
    rule: Callable[..., bool] = lambda *inputs: True

    @property
    def name(self) -> str:
        return self.function.__name__

    def example(self, device: Device, dtype: torch.dtype) -> tuple[Any, ...]:
        """The arguments of the example, the same at each call; random state stays as it was."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.example_inputs(torch.device(device), dtype)

    @property
    def has_triton(self) -> bool:
        """Whether a file `gpu` stands beside the operation's."""
        return find_spec(self.function.__module__.rpartition(".")[0] + ".gpu") is not None

    def is_live(self, inputs: tuple[Any, ...]) -> bool:
        """Whether a call with these arguments runs in Triton, not in plain PyTorch."""
        first = next(x for x in inputs if isinstance(x, Tensor))
        return self.has_triton and has_kernel(first) and self.rule(*inputs)


class Comparison(NamedTuple):
    """How far a result is from the one in float64, and how far it may be.

    Errors are relative, of the result as one vector; of integers, the share that differ.
    """

    result: str
    error: float
    bound: float

    @property
    def is_right(self) -> bool:
        return self.error <= self.bound  # NaN is not


def compare(kernel: Kernel, device: Device, dtype: torch.dtype) -> list[Comparison]:
    """Every result of the kernel's example, outputs and then gradients, against the reference.

    Args:
        kernel: The operation.
        device: Where it runs.
        dtype: Of its example, float32, float16 or bfloat16.

    Raises:
        ValueError: If operation and reference give results of different number or shape.
    """
    inputs = kernel.example(device, dtype)
    ours = _results(kernel, kernel.function, inputs)
    with plain():
        rounded = _results(kernel, kernel.reference, inputs)
        where = device if widest(torch.device(device)) == torch.float64 else "cpu"
        exact = _results(kernel, kernel.reference, converted(inputs, torch.float64, where))
    shapes = [{name: list(x.shape) for name, x in results.items()} for results in (ours, rounded)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"expected results of shapes {shapes[1]} as the reference has, got {shapes[0]}")
    comparisons = []
    for name, x in exact.items():
        bound = max(2 * _distance(rounded[name], x), _rounding(rounded[name].dtype))
        comparisons.append(Comparison(name, _distance(ours[name], x), bound))
    return comparisons


def converted(value: Any, dtype: torch.dtype, device: Device | None = None) -> Any:
    """The same arguments with all floating tensors in another dtype, and on a device, in tuples, lists and dataclasses too."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(converted(each, dtype, device) for each in value))
    if isinstance(value, tuple | list):
        return type(value)(converted(each, dtype, device) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(
            value, **{name: converted(each, dtype, device) for name, each in fields.items()}
        )
    return value


def gradient_like(y: Tensor) -> Tensor:
    """Random numbers of the shape, dtype and device of y, the same at each call: a gradient for an example."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)


def _results(kernel: Kernel, function: Callable[..., Any], inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    leaves = [inputs[i].detach().clone().requires_grad_() for i in kernel.differentiable]
    arguments = list(inputs)
    for i, leaf in zip(kernel.differentiable, leaves, strict=True):
        arguments[i] = leaf
    outputs = function(*arguments)
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    found = {f"output {i}": y for i, y in enumerate(outputs) if y is not None}
    if leaves:
        generator = torch.Generator().manual_seed(0)
        # Quarters, which every dtype holds without rounding.
        dy = [(torch.randint(-8, 9, y.shape, generator=generator) / 4).to(y) for y in found.values()]
        gradients = torch.autograd.grad(list(found.values()), leaves, dy)
        found |= {f"gradient {i}": g for i, g in zip(kernel.differentiable, gradients, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def _rounding(dtype: torch.dtype) -> float:
    """The error that any result may have: half precision is rounded once, sums in float32 more than once."""
    if not dtype.is_floating_point:
        return 0.0
    return torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 2 * torch.finfo(torch.float32).eps


def _distance(x: Tensor, exact: Tensor) -> float:
    x = x.to(exact.device)
    if not exact.is_floating_point():
        return (x != exact).double().mean().item()
    size, error = exact.norm().item(), (x.double() - exact).norm().item()
    return error / size if size > 0 else (0.0 if error == 0 else math.inf)
