"""Who would notice that something else runs than what is written down?

Tracers and transforms follow the operations, hooks wait for the calls of modules. For both, only
the plain path is right.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def is_traced(tensors: Iterable[Tensor]) -> bool:
    """Whether tracing, export, a function transform or forward-mode differentiation is on."""
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._are_functorch_transforms_active()
        or _is_exporting()
        or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)  # type: ignore[no-untyped-call]
    )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_METHODS = ("forward", "_conv_forward", "_call_impl")  # that wrappers replace on one module, not on its class


def has_hooks(*modules: nn.Module) -> bool:
    """Whether somebody waits for the call of one of these modules, or has put another function into its place."""
    return any(
        any(getattr(module, name) for name in _HOOKS) or any(name in vars(module) for name in _METHODS)
        for module in modules
    )


def _is_exporting() -> bool:
    is_exporting = getattr(torch.compiler, "is_exporting", None)  # torch 2.7 and later
    return bool(is_exporting and is_exporting())
