"""Tensors as memory: their strides, bits and versions, and their description in messages."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the dimensions of a tensor
LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}  # the mode of `F.interpolate`, by the same
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_plain(x: Tensor) -> bool:
    """Whether its values lie in one piece of memory: it is not sharded, quantized, nested or sparse."""
    ordinary = type(x) in (Tensor, nn.Parameter) or not is_traceable_wrapper_subclass(x)
    return ordinary and x.layout is torch.strided and not x.is_nested


def dense(x: Tensor) -> Tensor:
    """The same values without gaps: contiguous or channels_last, whichever the strides are like."""
    if x.is_contiguous():
        return x
    layout = CHANNELS_LAST.get(x.ndim) if x.stride(1) == 1 else None
    return x.contiguous(memory_format=layout or torch.contiguous_format)


def in_layout(x: Tensor, layout: torch.memory_format) -> Tensor:
    """The same values in this layout of channels last, also in the eyes of operations where there is a single channel."""
    x = x.contiguous(memory_format=layout)
    return x if x.shape[1] > 1 else x.as_strided(x.shape, (x.stride(0), 1, *x.stride()[2:]))


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side, and in no other order than that."""
    layout = CHANNELS_LAST.get(x.ndim)
    return layout is not None and x.is_contiguous(memory_format=layout) and not x.is_contiguous()


def laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same values with these strides: kernels may round otherwise on another layout."""
    return (
        x
        if x.stride() == strides
        else torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
    )


def memory(x: Tensor) -> int:
    """A number for the memory of a tensor, its own as long as that is in use."""
    number: int = x.untyped_storage()._cdata
    return number


def like(x: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    """What two tensors share of which one may lie in the other's memory."""
    return x.shape, x.stride(), x.dtype


def own(y: Tensor, *others: Tensor) -> Tensor:
    """The tensor with memory of its own: a copy if one of the others lies in the same."""
    return y.clone() if memory(y) in map(memory, others) else y


def has_values(x: Tensor) -> bool:
    """False for tensors that are shapes alone, on the meta device or fake, by which memory is predicted."""
    return not x.is_meta and getattr(x, "fake_mode", None) is None


def flat(x: Tensor) -> Tensor:
    """The values of a tensor without gaps [numel] in the order of memory; a view."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


def bits(x: Tensor) -> Tensor:
    """The bit patterns of a tensor without gaps, as integers [numel] in the order of memory; a view."""
    return flat(x).view(_INTEGER[x.element_size()])


def versions(*tensors: Tensor) -> list[int]:
    """Numbers that grow when a tensor is written to.

    Inference tensors have none, and a compiler that traces the plain path does not know them.
    """
    if torch.compiler.is_compiling():
        return []
    return [0 if x.is_inference() else x._version for x in tensors]


def describe(x: Tensor) -> str:
    """Shape, dtype and device, for messages."""
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
