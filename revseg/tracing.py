"""When the plain path must be taken: something follows the operations themselves.

Function transforms, forward-mode derivatives, export and tracing need to see each operation, and
an autograd function hides them. `torch.compile` is not among them: there the engine is a graph
break, so that activations stay unsaved.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_traced(inputs: Iterable[Tensor]) -> bool:
    """Whether operations on these tensors are being followed."""
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._are_functorch_transforms_active()
        or _is_exporting()
        or any(forward_ad.unpack_dual(x).tangent is not None for x in inputs)  # type: ignore[no-untyped-call]
    )


def _is_exporting() -> bool:
    is_exporting = getattr(torch.compiler, "is_exporting", None)  # torch 2.7 and later
    return bool(is_exporting and is_exporting())
