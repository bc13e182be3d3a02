"""Small tensors of a predicted run that keep their values.

Fake tensors have no values, yet programs read a few: the rates of drop path when a network is built, the count of
steps in an optimizer. So whatever follows from constants alone and is small is also computed for real, beside
the fake tensor that stands for it. Anything else cannot be read, and an error names the line that tried.
"""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

_SMALL = 1024  # elements
_VALUE = "_revseg_value"  # the attribute of a fake tensor that holds its value
_OURS = tuple(str(Path(path).parent) for path in (torch.__file__, Path(__file__).parent))


class UnpredictableError(RuntimeError):
    """A step that does what its values say, which a prediction cannot know."""


class Values:
    """What operations on fake tensors give, and beside it the values of those that have some."""

    def set(self, fake: Tensor, real: Tensor) -> None:
        """Let a fake tensor have the values of this one, as a copy, if it is small."""
        if real.numel() <= _SMALL and real.layout == torch.strided and not hasattr(fake, _VALUE):
            with _disable_current_modes(), torch.no_grad():
                if real.device.type == "cpu" and not isinstance(real, FakeTensor):
                    setattr(fake, _VALUE, real.detach().clone())

    def run(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]
    ) -> tuple[bool, Any]:
        """Whether the result is made of tensors, and the result; `given` are the tensors among the arguments.

        Raises:
            UnpredictableError: If it depends on values that nobody knows.
        """
        known = all(hasattr(x, _VALUE) for x in given) and "empty" not in func._opname
        if func is torch.ops.aten._local_scalar_dense.default:
            if known:
                with _disable_current_modes():
                    return False, getattr(given[0], _VALUE).item()
            raise UnpredictableError(_sentence("reads a number from a tensor"))
        try:
            result = func(*args, **kwargs)
        except DataDependentOutputException as error:
            if known:
                return False, self._compute(func, args, kwargs)
            raise UnpredictableError(_sentence("looks at the values of a tensor")) from error
        except DynamicOutputShapeException as error:
            raise UnpredictableError(_sentence("makes a tensor whose size depends on values")) from error
        self._keep(func, given, known, args, kwargs, result)
        return True, result

    def _keep(self, func: Any, given: list[Tensor], known: bool, args: Any, kwargs: Any, result: Any) -> None:
        made = tensors_in(result)
        if known and made and all(x.numel() <= _SMALL for x in made) and made[0].device.type == "cpu":
            values = tensors_in(self._compute(func, args, kwargs))
            for x, value in zip(made, values, strict=True):
                setattr(x, _VALUE, value)
        elif func._schema.is_mutable:
            for x in given:  # what was written to is not known any more
                if hasattr(x, _VALUE) and _is_written(func, args, kwargs, x):
                    delattr(x, _VALUE)

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        real_args, real_kwargs = tree_map_only(Tensor, lambda x: getattr(x, _VALUE), (args, kwargs))
        with _disable_current_modes():
            return func(*real_args, **real_kwargs)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors among the arguments or results of an operation: in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [x for each in value for x in tensors_in(each)]


def _is_written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> bool:
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and any(each is x for each in tensors_in(value)):
            return True
    return False


def _sentence(what: str) -> str:
    """What a line of the user's code does, and why that cannot be predicted."""
    frame = sys._getframe(1)
    while frame is not None and (
        frame.f_code.co_filename.startswith(_OURS) or frame.f_code.co_filename.startswith("<")
    ):
        frame = frame.f_back  # type: ignore[assignment]
    where = "a line"
    if frame is not None:
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        where = f"{frame.f_code.co_filename}:{frame.f_lineno}: `{line}`"
    return (
        f"{where} {what}; memory is predicted on shapes alone, where nobody knows the values: "
        "predict the step without that line (checks for NaN, logging, GradScaler)"
    )
