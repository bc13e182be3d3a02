"""Gradients that keep no larger one alive.

The gradient of a joined map is whole, and those of its pieces are views of it: one that waits for others, as that of a skip does,
keeps all of it. A copy does not; and where no other comes, whoever gets it finds it as it was: kernels sum in another order what
lies otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NOTE = "_revseg_lay"


@dataclass(frozen=True)
class _Lay:
    """How a gradient lay, and the version of its copy, to which another may be added."""

    elements: int
    stride: tuple[int, ...]
    offset: int
    version: int


def compact(grad: Tensor | None, x: Tensor) -> Tensor | None:
    """The gradient in memory of its own, until the node that made x asks for it.

    Args:
        grad: Of x.
        x: What was differentiated by.
    """
    if grad is None or grad.layout != torch.strided or grad.untyped_storage().nbytes() <= grad.nbytes:
        return grad
    own = grad.clone()
    elements = grad.untyped_storage().nbytes() // grad.itemsize
    setattr(own, _NOTE, _Lay(elements, grad.stride(), int(grad.storage_offset()), own._version))
    if x.grad_fn is not None:
        x.register_hook(_as_it_lay)  # type: ignore[no-untyped-call]
    return own


def _as_it_lay(grad: Tensor) -> Tensor | None:
    lay: _Lay | None = getattr(grad, _NOTE, None)
    if lay is None or grad._version != lay.version:
        return None
    whole = grad.new_empty(lay.elements)
    return whole.as_strided(grad.shape, lay.stride, lay.offset).copy_(grad)
