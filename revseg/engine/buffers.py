"""Buffers of modules, as they were before a run.

Buffers are swapped, never written: batch norm updates running statistics without raising their
version, so a change could not be noticed afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from revseg.engine.tensors import has_values

Buffers = dict[str, Tensor | None]  # of one module

_SMALL = 1 << 16  # bytes; a larger buffer is kept as a copy only if the function changed it


@contextmanager
def swapped_buffers(modules: Sequence[nn.Module], buffers: Sequence[Buffers] | None = None) -> Iterator[None]:
    """Let modules read and write copies, of these buffers or else of their own; then take those away."""
    present = [dict(module._buffers) for module in modules]
    try:
        for module, given in zip(modules, present if buffers is None else buffers, strict=True):
            _set_buffers(module, copies_of(given))
        yield
    finally:
        for module, own in zip(modules, present, strict=True):
            _set_buffers(module, own)


def refuse_gradients(modules: Iterable[nn.Module]) -> None:
    """Raise if a buffer requires grad: buffers are put back by copies, which hand no gradient on."""
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.requires_grad:
                raise RuntimeError(
                    f"{type(module).__name__}: the buffer {name!r} requires grad, and its gradient would be lost; make it "
                    "an input (a side input of the sequence), a parameter, or set save_activations=True"
                )


def _set_buffers(module: nn.Module, buffers: Buffers) -> None:
    """One by one, so that a thread that reads them finds each at any moment."""
    if not buffers and not module._buffers:
        return
    for name in module._buffers.keys() - buffers.keys():
        del module._buffers[name]
    module._buffers.update(buffers)


def copies_of(buffers: Buffers) -> Buffers:
    """Copies of the buffers of one module."""
    return {name: None if buffer is None else buffer.detach().clone() for name, buffer in buffers.items()}


def share_unchanged(copies: Buffers, originals: Buffers) -> None:
    """Let go of copies of large buffers that the function only read."""
    for name, copy in copies.items():
        original = originals[name]
        if copy is None or original is None or copy.nbytes <= _SMALL:
            continue
        if not has_values(copy) or torch.equal(copy, original):
            copies[name] = original
