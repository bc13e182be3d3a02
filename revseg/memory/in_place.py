"""Which additions of gradients autograd would do in place, were operations not followed.

Where it adds a second gradient to one that nobody else holds, a real run needs no memory for the sum. While a
dispatch mode looks on, autograd makes a new tensor for every sum, so who follows a run has to find out who holds
the first summand. How many uses are those of the engine and of the look itself differs between versions of
PyTorch; `uses_alone` counts them where nobody else is there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_AROUND = ("_python_dispatch.py", "_compile.py", "eval_frame.py")  # what torch puts around a dispatch mode


def adds_in_place(func: Any, args: tuple[Any, ...], frame: Any, alone: tuple[int, int]) -> bool:
    """Whether autograd adds a gradient to an earlier one that nobody else holds.

    Args:
        func: The operation.
        args: Its arguments.
        frame: That of Python which called for it.
        alone: `uses_alone()`, counted beforehand: counting makes nodes of autograd, whose numbers go up.
    """
    if not _is_sum_of_gradients(func):
        return False
    while frame is not None and frame.f_code.co_filename.endswith(_AROUND):
        frame = frame.f_back
    if frame is None or frame.f_code.co_name != "_engine_run_backward":
        return False
    x: Tensor = args[0]
    if x.untyped_storage().nbytes() > x.nbytes:
        return False  # a part of another one
    return all(now <= at_most for now, at_most in zip(_uses(x), alone, strict=True))


def _is_sum_of_gradients(func: Any) -> bool:
    return func is torch.ops.aten.add.Tensor and torch._C._current_autograd_node() is not None


def _uses(x: Tensor) -> tuple[int, int]:
    """Of a tensor's storage, and of the tensor."""
    of_storage: int = torch._C._storage_Use_Count(x.untyped_storage()._cdata)
    of_tensor: int = x._use_count()  # type: ignore[attr-defined]
    return of_storage, of_tensor


@functools.cache
def uses_alone() -> tuple[int, int]:
    """Uses of a gradient's storage and of the gradient that only the engine holds, and who looks."""
    look = _Look()
    with look, torch.enable_grad(), torch.device("cpu"):
        x = torch.zeros(1, requires_grad=True)
        y = x * 1
        torch.autograd.grad((y * 2).sin() + (y * 3).sin(), x, torch.zeros(1))
    return look.found


class _Look(TorchDispatchMode):
    """Counts the uses of the first gradient to which another one is added."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: tuple[int, int] = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _is_sum_of_gradients(func):
            self.found = _uses(args[0])
        return func(*args, **(kwargs or {}))
