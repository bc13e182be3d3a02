"""A row of layers that keeps its input alone, and goes by bands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from revseg.engine.drift import Check
from revseg.engine.gradients import Grads, alias
from revseg.engine.tracing import has_hooks, is_traced
from revseg.layers.bands.cut import BandPlan, Bands
from revseg.layers.bands.row import BandedRow
from revseg.layers.bands.rows import Whole
from revseg.layers.recompute import Recompute
from revseg.layers.stack import layers_of, stacks_are_right
from revseg.layers.stack_layer import Layer

Map = Tensor | tuple[Tensor, Tensor]  # a map, or two that stand for one, joined by their channels: streams


def may_go_by_bands(wrapper: Recompute, parts: Sequence[Tensor]) -> bool:
    """Whether maps may go by bands in this call: in training, or where there are gradients, and nobody traces it."""
    traced = torch.compiler.is_compiling() or is_traced(parts)
    inference = not (torch.is_grad_enabled() or wrapper.training)  # has the bits of all levels
    return not (wrapper.save_activations or traced or inference) and all(map(stacks_are_right, parts))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The map that they stand for."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), 1)


class ByBands(Recompute):
    """Layers in a row whose maps are never whole: each exists in some rows at a time, forward and backward.

    ```python
    stem = ByBands(Stack(ConvBNAct(3, 8, stride=2), ConvBNAct(8, 8)))
    y = stem(x)   # keeps x
    ```

    The state dict is that of the module, without a prefix.

    Args:
        module: A `Stack`, or one layer of it, like `ConvBNAct`. Of others, and of a row with a layer that is not
            local, this is a `Recompute`.
        bands: How maps are cut, and what may be kept whole.
        streams: The output is two tensors, its halves by channels, as a `ReversibleSequence` takes them without a copy.
        save_activations: True for the plain twin: ordinary autograd, the same numbers.
        check: See `Recompute`; the layers of a row by bands have no hidden state, and are not checked.

    Memory: the input. In the forward pass one raw map, the largest; in the backward pass one, and those that
    `bands.kept` allows; and some bands.

    Numerics: exact, batch norm in training mode too, up to the order of sums: statistics and gradients of weights are sums
    over bands, nearer to those of real numbers than plain PyTorch's.
    """

    def __init__(
        self,
        module: nn.Module,
        bands: Bands | None = None,
        *,
        streams: bool = False,
        save_activations: bool = False,
        check: Check = "error",
    ) -> None:
        super().__init__(module, save_activations=save_activations, check=check)
        self.bands, self.streams = bands or Bands(), streams

    def forward(self, x: Map) -> Any:
        """The output [N, C, h, w], or its halves.

        Args:
            x: The input [N, C, H, W], or its halves.
        """
        parts = (x,) if isinstance(x, Tensor) else tuple(x)
        layers = self._layers(parts) if may_go_by_bands(self, parts) else None
        if layers is None:
            y = super().forward(joined(parts))
            return tuple(y.chunk(2, 1)) if self.streams else y
        y = self._by_bands(layers, parts)
        return y if self.streams else y[0]

    def _layers(self, parts: Sequence[Tensor]) -> Sequence[Layer] | None:
        """The layers of the module; None if it does not go by bands."""
        if has_hooks(self.module):
            return None
        layers = layers_of(self.module)
        return layers if layers and BandPlan.takes(layers, parts[0]) else None

    @_disable_dynamo
    def _by_bands(self, layers: Sequence[Layer], parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        row = BandedRow(layers, Whole(*parts), self.bands)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*parts, *row.tensors)):
            return _ByBands.apply(row, self.streams, len(parts), *parts, *row.tensors)  # type: ignore[no-any-return, no-untyped-call]
        return row.first_run(Whole(*parts), lambda: _output(row, self.streams, parts[0])).parts


class _ByBands(torch.autograd.Function):
    boxed_grads_call = True  # where torch knows it, the incoming gradients are freed after their first use

    @staticmethod
    def forward(ctx: Any, row: BandedRow, streams: bool, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.row, ctx.count = row, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return row.first_run(Whole(*tensors[:count]), lambda: _output(row, streams, tensors[0])).parts

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, *box: Any) -> Any:
        dys: Grads = box[0] if isinstance(box[0], list) else list(box)
        row: BandedRow = ctx.row
        tensors = ctx.saved_tensors
        if all(dy is None for dy in dys):
            return (None,) * (3 + len(tensors))
        wanted = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():
            return None, None, None, *differentiable(row.rerun_with_graph, ctx.count, tensors, dys, wanted)
        parts, parameters = tensors[: ctx.count], tensors[ctx.count :]
        given = dys if any(dy is None for dy in dys) else None
        dz = Whole(*(_filled(row, dys, k) if given else dy for k, dy in enumerate(dys)))  # type: ignore[arg-type]
        dys.clear()
        dx: list[Tensor] = []

        def make_dx() -> Whole:
            dx[:] = [torch.empty_like(part) for part in parts]
            return Whole(*dx)

        of_input = any(wanted[: ctx.count])
        found = row.gradients(
            Whole(*parts), parameters, dz, wanted[ctx.count :], make_dx if of_input else None
        )
        return None, None, None, *(dx if dx else [None] * ctx.count), *found


def _filled(row: BandedRow, dys: Grads, k: int) -> Tensor:
    """The gradient of output k, zeros if it has none."""
    dy = dys[k]
    return dy if dy is not None else next(torch.zeros_like(other) for other in dys if other is not None)


def differentiable(
    run: Callable[[Tensor, Sequence[Tensor]], Tensor],
    count: int,
    tensors: Sequence[Tensor],
    dys: Grads,
    wanted: Sequence[bool],
) -> Grads:
    """The gradients with a graph of their own (`create_graph=True`).

    Args:
        run: Makes the output of the map and the parameters, with a graph.
        count: How many of the tensors are parts of the map; the others are parameters.
        tensors: What to differentiate by.
        dys: The gradients of the parts of the output.
        wanted: Whether the gradient of each tensor is.
    """
    aliases = [alias(t) for t in tensors]
    z = run(joined(aliases[:count]), aliases[count:])
    ends = zip(z.chunk(len(dys), 1), dys, strict=True)
    ys, given = zip(*((y, dy) for y, dy in ends if dy is not None), strict=True)
    asked = [t for t, w in zip(aliases, wanted, strict=True) if w]
    found = iter(torch.autograd.grad(ys, asked, given, create_graph=True, allow_unused=True))
    return [next(found) if w else None for w in wanted]


def _output(row: BandedRow, streams: bool, x: Tensor) -> Whole:
    """Memory for the output."""
    n, channels, height, width = row.plan.shapes[-1]
    count = 2 if streams else 1
    layout = row.plan.layout or torch.contiguous_format
    return Whole(
        *(
            torch.empty(
                n,
                channels // count,
                height,
                width,
                dtype=row.plan.dtype,
                device=x.device,
                memory_format=layout,
            )
            for _ in range(count)
        )
    )
