"""Buffers of modules, as they were before a run.

Buffers are swapped, never written: batch norm updates running statistics without raising their
version, so a change could not be noticed afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from revseg.tensors import has_values

Buffers = dict[str, Tensor | None]  # of one module

_SMALL = 1 << 16  # bytes; a larger buffer is kept as a copy only if the function changed it


@contextmanager
def swapped_buffers(modules: Sequence[nn.Module], buffers: Sequence[Buffers] | None = None) -> Iterator[None]:
    """Let modules read and write copies, of these buffers or else of their own; then take those away."""
    present = buffers_of(modules)
    try:
        _set_buffers(modules, copies_of(present if buffers is None else buffers))
        yield
    finally:
        _set_buffers(modules, present)


def refuse_gradients(modules: Iterable[nn.Module]) -> None:
    """Raise if a buffer requires grad: buffers are put back by copies, which hand no gradient on."""
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.requires_grad:
                raise RuntimeError(
                    f"{type(module).__name__}: the buffer {name!r} requires grad, and its gradient would be lost; make it "
                    "an input (a side input of the sequence), a parameter, or set save_activations=True"
                )


def buffers_of(modules: Iterable[nn.Module]) -> list[Buffers]:
    """The buffers of each module, themselves."""
    return [dict(module._buffers) for module in modules]


def copies_of(buffers: Sequence[Buffers]) -> list[Buffers]:
    """Copies of the buffers of each module."""
    return [
        {name: None if x is None else x.detach().clone() for name, x in each.items()} if each else {}
        for each in buffers
    ]


def share_unchanged(copies: Sequence[Buffers], originals: Sequence[Buffers]) -> None:
    """Let go of copies of large buffers that the function only read."""
    for each, own in zip(copies, originals, strict=True):
        for name, copy in each.items():
            original = own[name]
            if copy is None or original is None or copy.nbytes <= _SMALL:
                continue
            if not has_values(copy) or torch.equal(copy, original):
                each[name] = original


def _set_buffers(modules: Sequence[nn.Module], buffers: Sequence[Buffers]) -> None:
    """One by one, so that a thread that reads them finds each at any moment."""
    for module, given in zip(modules, buffers, strict=True):
        if given or module._buffers:
            for name in module._buffers.keys() - given.keys():
                del module._buffers[name]
            module._buffers.update(given)
