"""Who would notice that something else runs than what is written down?

Tracers and transforms follow the operations, hooks wait for the calls of modules. For both, only
the plain path is right.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy

_TRACERS = "torch.export.export(model, inputs) and torch.jit.trace(model, inputs)"


def is_traced(values: Iterable[Tensor | Proxy]) -> bool:
    """Whether tracing, export, a function transform or forward-mode differentiation is on.

    Raises:
        TypeError: If a value is a symbol of `torch.fx.symbolic_trace`, which follows no branches.
    """
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._are_functorch_transforms_active()
        or _is_exporting()
        or any(_is_dual(x) for x in values)
    )


def _is_dual(x: Tensor | Proxy) -> bool:
    refuse_symbol(x)
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def refuse_symbol(x: object) -> None:
    """Refuse what stands for a tensor while `torch.fx.symbolic_trace` runs.

    Raises:
        TypeError: If x is such a symbol.
    """
    if isinstance(x, Proxy):
        raise TypeError(
            "torch.fx.symbolic_trace follows no branches, so it cannot follow modules of revseg; "
            f"{_TRACERS} record their ordinary operations"
        )


class Unscriptable:
    """A module that TorchScript is not to compile: it would find source code that it does not know."""

    def __prepare_scriptable__(self) -> None:
        """Called by `torch.jit.script`.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__name__}; {_TRACERS} record its ordinary operations"
        )


def has_hooks(*modules: nn.Module) -> bool:
    """Whether somebody waits for the call of one of these modules, or has put another function into its place."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__  # wrappers replace these on one module, not on its class
            or "_conv_forward" in module.__dict__
            or "_call_impl" in module.__dict__
        ):
            return True
    return False


def _is_exporting() -> bool:
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    if flag is None:
        return torch.compiler.is_exporting()
    return flag  # in torch.compile some releases say is_exporting() though nobody exports
