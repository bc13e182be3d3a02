"""Elementwise passes of a CPU, each compiled into one loop.

The plain version of an operation goes through a block of a map once for every addition and
multiplication, within the cache. Where a C++ compiler is at hand, torch.compile makes one loop of them
all, which takes a third of that time. The loops are made when the first large map comes, some
seconds for all of them, and are kept on disk by torch. Small maps are not worth the call.

Here a map is a matrix [R, K] whose rows each belong to one channel, and a vector has a value for each
row [R, 1]; or, in channels_last, a map is [N * H, W, C] and a vector [1, 1, C], few channels side by side with those of
the next pixels (`revseg.kernels.cpu.blocks`). Values are the plain version's up to rounding.

`REVSEG_COMPILE=0` in the environment keeps to the plain versions.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from revseg.kernels.cpu.blocks import Matrix
from revseg.kernels.dispatch import kernels_are_on
from revseg.kernels.shapes import has_values

LEAST = 1 << 18  # values of a map that is worth a call
_TYPICAL = {
    True: ((32, 1 << 14), (32, 1)),
    False: ((64, 256, 32), (1, 1, 32)),
}  # by row or not: a map, a vector
MOST = 1 << 31  # beyond, indices are of another type
KINDS = 8  # of dtype, layout and settings: each makes its own loops, which takes seconds

_OPTIONS: dict[str, Any] = {
    "emulate_precision_casts": True,  # or a value is added to a stream before it is rounded to the dtype of its map
    "realize_reads_threshold": 1000,  # or what several sums share is written to a map of its own
}

_log = logging.getLogger(__name__)
_kinds: dict[tuple[Any, ...], bool] = {}


def is_large(x: Tensor) -> bool:
    """Whether a map is worth the call of a compiled pass."""
    return x.numel() >= LEAST


def is_compiled(u: Matrix) -> bool:
    """Whether passes over this map are compiled.

    The answer depends on its kind alone, so that a pass that runs twice gives the same bits.
    """
    data = u.data
    return (
        data.device.type == "cpu"
        and is_large(data)
        and data.numel() < MOST
        and min(u.whole().shape) > 1
        and has_values(data)
        and kernels_are_on()
        and os.environ.get("REVSEG_COMPILE", "1") != "0"
        and not _get_current_dispatch_mode_stack()
        and _can_compile(data.dtype, u.by_row)
    )


def may_add(u: Matrix, stream: Matrix) -> bool:
    """Whether a compiled pass may add the activated map to a stream: it must round the map to its dtype in between."""
    dtype = u.data.dtype
    return dtype in (torch.float32, torch.float64) or _rounds_in_between(
        dtype, stream.data.dtype, _kind(dtype, u.by_row)
    )


@cache
def _rounds_in_between(dtype: torch.dtype, of_stream: torch.dtype, kind: tuple[Any, ...]) -> bool:
    """What the compiler does, which torch 2.8 does not: there the map stays wider than its dtype."""
    of_map, of_vector = _TYPICAL[kind[1]]
    vectors = [torch.full(of_vector, v) for v in (0.1, 1.5, 0.2, 0.3)]
    whole = torch.linspace(-2, 2, math.prod(of_map)).view(of_map).to(dtype)
    try:
        # the second is too narrow for vector instructions, which have code of their own
        return all(_adds_rounded(u, vectors, of_stream) for u in (whole, whole[:, :5].contiguous()))
    except Exception as error:  # noqa: BLE001, whatever it is, two passes do
        _log.warning("torch.compile fails at an activation that is added in %s: %s", dtype, error)
        return False


@torch.no_grad()
def _adds_rounded(u: Tensor, vectors: list[Tensor], of_stream: torch.dtype) -> bool:
    stream, h = u.square().to(of_stream), _activated(u, *vectors)
    found = {"act_added": torch.empty_like(stream), "act_subtracted": torch.empty_like(stream)}
    for name, out in found.items():
        run(name, u, *vectors, stream, out)
    return torch.equal(found["act_added"], stream + h) and torch.equal(found["act_subtracted"], stream - h)


def _can_compile(dtype: torch.dtype, by_row: bool) -> bool:
    """Whether loops for this dtype, layout and the present settings could be made; tried once."""
    kind = _kind(dtype, by_row)
    if kind not in _kinds:
        _kinds[kind] = sum(_kinds.values()) < KINDS and _has_compiler() and _tried(dtype, by_row)
    return _kinds[kind]


def _kind(dtype: torch.dtype, by_row: bool) -> tuple[Any, ...]:
    """What makes another loop of the same pass."""
    return (
        dtype,
        by_row,
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
    )


@cache
def _has_compiler() -> bool:
    """Whether torch.compile may be used here, and finds a C++ compiler."""
    disabled = any(
        os.environ.get(name, "0") == "1" for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
    )
    if disabled or sys.platform != "linux":
        return False
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return bool(get_cpp_compiler())
    except Exception:  # noqa: BLE001, torch's own errors differ from version to version
        return False


def _tried(dtype: torch.dtype, by_row: bool) -> bool:
    """Whether a first loop can be made and gives what it should."""
    # of a typical size, for which the loops are then made: short rows would not get vector instructions
    of_map, of_vector = _TYPICAL[by_row]
    x = torch.linspace(-2, 2, math.prod(of_map)).view(of_map).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    vectors = [torch.full(of_vector, v, dtype=wide) for v in (0.1, 1.5, 0.2, 0.3)]
    try:
        with torch.no_grad():
            found = torch.empty_like(x)
            run("act", x, *vectors, found)
            part, expected = x[:1], torch.empty_like(x[:1])  # of the first step this may be the peak
            PASSES["act"](part, *(v[:1] for v in vectors), expected)
        if torch.allclose(found[:1], expected, rtol=1e-2):
            return True
        _log.warning("torch.compile gives wrong values here; elementwise passes stay uncompiled")
    except Exception as error:  # noqa: BLE001, whatever it is, the plain passes do
        _log.warning("torch.compile fails here, so elementwise passes stay uncompiled: %s", error)
    return False


def run(name: str, *args: Tensor) -> Any:
    """One of `PASSES`, compiled.

    Arguments are given by themselves, not as views: loops would be made anew for each shape of what they view.
    """
    with ExitStack() as stack:
        for _ in range(torch._C._len_torch_function_stack()):  # it would be compiled anew under each
            stack.enter_context(_pop_mode_temporarily())
        found = _compiled(name, _kind(args[0].dtype, args[0].ndim == 2))(*(x.data for x in args))
        if name in _WRITTEN and not (written := args[_WRITTEN[name]]).is_inference():
            increment_version(written)  # autograd then refuses what it saved of it
        return found


@cache
def _compiled(name: str, kind: tuple[Any, ...]) -> Callable[..., Any]:
    passing: Any = PASSES[name]
    # torch counts the loops that it made from one piece of code, and refuses more than a few: each kind has its own
    own = FunctionType(passing.__code__.replace(), passing.__globals__, f"{name} {kind}")
    return torch.compile(own, dynamic=True, fullgraph=True, options=_OPTIONS)


# --- the passes; sums are over dim 1: by row [R], or [N * H, C] -------------------------------------------------


def _normalized(u: Tensor, mean: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return (u - mean) * scale + bias


def _activated(u: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, slope: Tensor) -> Tensor:
    n = _normalized(u, mean, scale, bias)
    below = torch.where(slope == 0, n.clamp(min=0), n * slope)  # ReLU makes 0 of an infinity
    return torch.where(n > 0, n, below).to(u.dtype)


def _statistics(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, what rounding left of it times K, and the sum of squared distances from it."""
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    mean = u.mean(1, keepdim=True)
    rest = u - mean
    return mean.squeeze(1), rest.sum(1), rest.square().sum(1)


def _act(u: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, slope: Tensor, out: Tensor) -> None:
    out.copy_(_activated(u, mean, scale, bias, slope))


def _act_in_place(u: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, slope: Tensor) -> None:
    u.copy_(_activated(u, mean, scale, bias, slope))


def _act_added(
    u: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, slope: Tensor, stream: Tensor, out: Tensor
) -> None:
    out.copy_(stream + _activated(u, mean, scale, bias, slope))


def _act_subtracted(
    u: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, slope: Tensor, stream: Tensor, out: Tensor
) -> None:
    out.copy_(stream - _activated(u, mean, scale, bias, slope))


def _to_channels_last(x: Tensor, out: Tensor) -> None:
    out.copy_(x)


def _to_contiguous(x: Tensor, out: Tensor) -> None:
    out.copy_(x)


def _gradient(
    u: Tensor, dz: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The distances u - mean, n and dn."""
    n = _normalized(u, mean, scale, bias)
    g = dz.to(u.dtype)
    return u - mean, n, torch.where(n > 0, g, g * slope)


def _sums(
    u: Tensor, dz: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of dn, of dn * (u - mean) and of dz * n below 0."""
    c, n, dn = _gradient(u, dz, mean, scale, bias, slope)
    return dn.sum(1), (c * dn).sum(1), (n.clamp(max=0) * dz.to(u.dtype)).sum(1)


def _du(
    u: Tensor,
    dz: Tensor,
    mean: Tensor,
    scale: Tensor,
    bias: Tensor,
    slope: Tensor,
    by_u: Tensor,
    constant: Tensor,
) -> Tensor:
    """The gradient of the raw map, dn * scale + (u - mean) * by_u - constant."""
    c, _, dn = _gradient(u, dz, mean, scale, bias, slope)
    # where nothing goes through the statistics, an infinity in u must not make NaN of zero
    return dn * scale + (torch.where(by_u == 0, 0.0, c * by_u) - constant)


def _apply(u: Tensor, dz: Tensor, *vectors_and_out: Tensor) -> None:
    *vectors, out = vectors_and_out
    out.copy_(_du(u, dz, *vectors))


def _apply_to_map(u: Tensor, dz: Tensor, *vectors: Tensor) -> None:
    u.copy_(_du(u, dz, *vectors))


def _apply_to_gradient(u: Tensor, dz: Tensor, *vectors: Tensor) -> None:
    dz.copy_(_du(u, dz, *vectors))


PASSES: dict[str, Callable[..., Any]] = {
    "statistics": _statistics,
    "act": _act,
    "act_in_place": _act_in_place,
    "act_added": _act_added,
    "act_subtracted": _act_subtracted,
    "to_channels_last": _to_channels_last,
    "to_contiguous": _to_contiguous,
    "sums": _sums,
    "apply": _apply,
    "apply_to_map": _apply_to_map,
    "apply_to_gradient": _apply_to_gradient,
}
_WRITTEN = {  # which argument a pass writes to
    **dict.fromkeys(("act", "act_added", "act_subtracted", "to_channels_last", "to_contiguous", "apply"), -1),
    **dict.fromkeys(("act_in_place", "apply_to_map"), 0),
    "apply_to_gradient": 1,
}
