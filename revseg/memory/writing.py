"""Which calls of PyTorch's functions write to what they are called with."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "div", "mod", "pow", "matmul")
_OF_BITS = ("and", "or", "xor", "lshift", "rshift")
_IN_PLACE_OPERATORS = frozenset(f"__i{name}__" for name in (*_ARITHMETIC, *_OF_BITS))


def writes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call writes to a tensor among its arguments, as its name, its schema or its arguments say."""
    if kwargs.get("out") is not None or _always_writes(func):
        return True
    place = _place_of_inplace(func)
    return place is not None and bool(kwargs.get("inplace", args[place] if place < len(args) else False))


@cache
def _always_writes(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = getattr(func, "__name__", "")
    ends = name.endswith("_") and not name.endswith("__")
    return ends or name == "__setitem__" or name in _IN_PLACE_OPERATORS


@cache
def _place_of_inplace(func: Any) -> int | None:
    """That of an argument `inplace`; None if there is none, as there is of no function written in C++."""
    try:
        names = [*inspect.signature(func).parameters]
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None
