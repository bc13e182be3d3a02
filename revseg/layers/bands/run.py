"""A row of layers by bands as an operation of autograd: it keeps its input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from revseg.engine.gradients import Grads, alias
from revseg.layers.bands.cut import Bands
from revseg.layers.bands.row import BandedRow
from revseg.layers.bands.rows import Asked, Whole
from revseg.layers.stack_layer import Layer

Map = Tensor | tuple[Tensor, Tensor]  # a map, or two that stand for one, joined by their channels: streams


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The map that they stand for."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), 1)


@_disable_dynamo
def run_by_bands(
    layers: Sequence[Layer],
    parts: tuple[Tensor, ...],
    bands: Bands,
    streams: bool = False,
    without: bool = False,
) -> tuple[Tensor, ...]:
    """The output of layers that are all local: one map, or as streams its halves.

    Args:
        layers: Which.
        parts: The input [N, C, rows, ...], or several tensors that are joined by their channels.
        bands: How maps are cut.
        streams: Whether the output is two tensors.
        without: Whether, of a second run, gradients alone matter: the output then is one of shapes, without values.
    """
    row = BandedRow(layers, Whole(*parts), bands)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*parts, *row.tensors)):
        return _ByBands.apply(row, streams, without, len(parts), *parts, *row.tensors)  # type: ignore[no-any-return, no-untyped-call]
    return row.first_run(Whole(*parts), lambda: _output(row, streams, parts[0])).parts


class _ByBands(torch.autograd.Function):
    boxed_grads_call = True  # where torch knows it, the incoming gradients are freed after their first use

    @staticmethod
    def forward(
        ctx: Any, row: BandedRow, streams: bool, without: bool, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.row, ctx.count = row, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        if without:
            row.take_statistics(Whole(*tensors[:count]))
            return (
                tuple(_shape_of(row, tensors[0], 2) for _ in range(2))
                if streams
                else (_shape_of(row, tensors[0], 1),)
            )
        return row.first_run(Whole(*tensors[:count]), lambda: _output(row, streams, tensors[0])).parts

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, *box: Any) -> Any:
        dys: Grads = box[0] if isinstance(box[0], list) else list(box)
        row: BandedRow = ctx.row
        tensors = ctx.saved_tensors
        if all(dy is None for dy in dys):
            return (None,) * (4 + len(tensors))
        wanted = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():

            def run(parts: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
                return row.rerun_with_graph(joined(parts), parameters)

            return None, None, None, None, *differentiable(run, ctx.count, tensors, dys, wanted)
        parts, parameters = tensors[: ctx.count], tensors[ctx.count :]
        given = dys if any(dy is None for dy in dys) else None
        dzs: list[Tensor] = [_filled(row, dys, k) if given else dy for k, dy in enumerate(dys)]  # type: ignore[misc]
        dys.clear()
        dx = Asked(Whole(*parts))
        of_input = any(wanted[: ctx.count])
        if of_input and row.plan.lies_over(parts, dzs):
            dx.made = Whole(*_lying_over(parts, dzs))
        dz = Whole(*dzs)
        dzs.clear()
        found = row.gradients(dx.x, parameters, dz, wanted[ctx.count :], dx if of_input else None)
        return None, None, None, None, *dx.gradients(), *found


def _lying_over(parts: Sequence[Tensor], dzs: list[Tensor]) -> list[Tensor]:
    """Memory for the gradient of the input that is that of the gradient of the output, copied so that nobody else has it."""
    found = []
    for k, x in enumerate(parts):
        dzs[k] = dzs[k].clone()
        found.append(dzs[k].as_strided(x.shape, x.stride()).data)  # in the eyes of autograd no view
    return found


def _filled(row: BandedRow, dys: Grads, k: int) -> Tensor:
    """The gradient of output k, zeros if it has none."""
    dy = dys[k]
    return dy if dy is not None else next(torch.zeros_like(other) for other in dys if other is not None)


def differentiable(
    run: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
    count: int,
    tensors: Sequence[Tensor],
    dys: Grads,
    wanted: Sequence[bool],
) -> Grads:
    """The gradients with a graph of their own (`create_graph=True`).

    Args:
        run: Makes the output of the parts of the map and the parameters, with a graph.
        count: How many of the tensors are parts of the map; the others are parameters.
        tensors: What to differentiate by.
        dys: The gradients of the parts of the output.
        wanted: Whether the gradient of each tensor is.
    """
    aliases = [alias(t) for t in tensors]
    z = run(aliases[:count], aliases[count:])
    ends = zip(z.chunk(len(dys), 1), dys, strict=True)
    ys, given = zip(*((y, dy) for y, dy in ends if dy is not None), strict=True)
    asked = [t for t, w in zip(aliases, wanted, strict=True) if w]
    found = iter(torch.autograd.grad(ys, asked, given, create_graph=True, allow_unused=True))
    return [next(found) if w else None for w in wanted]


def _output(row: BandedRow, streams: bool, x: Tensor) -> Whole:
    """Memory for the output."""
    count = 2 if streams else 1
    return Whole(*(memory_of(row, x, count) for _ in range(count)))


def _shape_of(row: BandedRow, x: Tensor, parts: int) -> Tensor:
    """What stands for the output, or one of so many parts of it: a single value everywhere."""
    n, channels, *size = row.plan.shapes[-1]
    return torch.zeros((), dtype=row.plan.dtype, device=x.device).expand(n, channels // parts, *size).data


def memory_of(row: BandedRow, x: Tensor, parts: int = 1) -> Tensor:
    """Memory for the output of a row, or for one of so many parts of its channels, where x is."""
    n, channels, *size = row.plan.shapes[-1]
    layout = row.plan.layout or torch.contiguous_format
    shape = n, channels // parts, *size
    return torch.empty(shape, dtype=row.plan.dtype, device=x.device, memory_format=layout)
