"""One run of a stack: what is fixed about it, the way forward, and the way back.

`revseg.layers.stack` says what a stack keeps. Here is the arithmetic: which parameter belongs to which layer, how a
raw map follows from the one before, and gradients that reuse each other's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from revseg import ops
from revseg.engine.context import is_casting, without_autocast
from revseg.engine.function import Coupled, Onto
from revseg.engine.memo import remember
from revseg.layers.linear import Grads, Source
from revseg.layers.stack_layer import Layer


class Plan:
    """What is fixed about one run of a stack: makers, settings, which parameter is whose."""

    def __init__(self, layers: Sequence[Layer], x: Tensor) -> None:
        self.layers = layers
        self.parameters: list[Tensor] = []
        self.slots: list[list[int | None]] = []  # for each layer: where its parameters stand
        for layer in layers:
            slots: list[int | None] = []
            for p in layer.all_parameters():
                slots.append(None if p is None else len(self.parameters))
                self.parameters += [] if p is None else [p]
            self.slots.append(slots)
        self.batch = [layer.uses_batch() for layer in layers]
        self.device = x.device.type
        self.cast = torch.get_autocast_dtype(self.device) if is_casting(self.device) else None

    def forward(
        self, x: Tensor, parameters: Sequence[Tensor], kept: list[Tensor] | None, onto: Onto | None
    ) -> Coupled:
        """The output; `kept` receives the raw maps, and `statistics` their means and variances."""
        self.statistics: list[tuple[Tensor, Tensor]] = []
        norm: ops.Norm | None = None  # what follows the raw map that a layer reads
        with self.no_autocast():
            for i, layer in enumerate(self.layers):
                own = [self.lowered(p) for p in self.of_maker(i, parameters)]
                like = kept[-1] if kept else x
                dilation = layer.dilation(like)
                if dilation is None:
                    made = layer.maker.make(self.source(x, kept, norm), like, own, i > 0)
                    statistics = remember(partial(layer.statistics, made))
                else:
                    made, statistics = layer.convolve(self.lowered(like), norm, own[0], dilation)
                self.statistics.append(statistics)
                norm = self.norm(i, parameters)
                if kept is not None:
                    kept.append(made)
                elif i < len(self.layers) - 1:
                    reads_raw = self.layers[i + 1].dilation(made) is not None
                    x = made if reads_raw else ops.bn_act(made, norm, out=made)
            assert norm is not None
            return self.finish(made, norm, made if kept is None else None, onto)

    def finish(self, u: Tensor, norm: ops.Norm, out: Tensor | None, onto: Onto | None) -> Coupled:
        """The output of the last layer, added to the stream if there is one that fits."""
        stream, sign = onto or (None, 0)
        fits = stream is not None and stream.shape == u.shape
        if stream is None or not fits or torch.promote_types(u.dtype, stream.dtype) != stream.dtype:
            return ops.bn_act(u, norm, out=out), None
        return ops.bn_act_add(u, norm, stream, sign), u.dtype

    def source(self, x: Tensor, kept: Sequence[Tensor] | None, norm: ops.Norm | None) -> Source:
        """The input of a layer: of the stack, or computed from the raw map of the layer before, if that was kept."""
        if not kept or norm is None:
            return lambda pick: self.lowered(pick(x))
        u = kept[-1]
        return lambda pick: ops.bn_act(pick(u), norm)

    def plain(self, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The output by ordinary autograd, any number of times differentiable."""
        for i, layer in enumerate(self.layers):
            made = layer.maker.forward(self.lowered(x), *map(self.lowered, self.of_maker(i, parameters)))
            norm, batch = self.norm(i, parameters), self.batch[i]
            running: Any = self.layers[i].bn.running_mean
            mean, var = (None, None) if batch else (s.to(running.dtype) for s in (norm.mean, norm.var))
            n = F.batch_norm(made, mean, var, norm.weight, norm.bias, batch, 0.0, norm.eps)
            if isinstance(norm.slope, Tensor):
                x = F.prelu(n, norm.slope.to(n.dtype))
            else:
                x = F.leaky_relu(n, norm.slope) if norm.slope != 1.0 else n
        return x

    def of_maker(self, i: int, parameters: Sequence[Tensor]) -> list[Tensor]:
        return [parameters[slot] for slot in self.slots[i][:-3] if slot is not None]

    def norm(self, i: int, parameters: Sequence[Tensor]) -> ops.Norm:
        weight, bias, slope = (None if slot is None else parameters[slot] for slot in self.slots[i][-3:])
        mean, var = self.statistics[i]
        return ops.Norm(
            mean,
            var,
            weight,
            bias,
            self.layers[i].fixed_slope() if slope is None else slope,
            self.layers[i].bn.eps,
        )

    def no_autocast(self) -> AbstractContextManager[Any]:
        """Arguments are cast here: autocast would keep casts that were made without a graph."""
        return without_autocast(self.device)  # a backward pass may run under another state

    def lowered(self, x: Tensor) -> Tensor:
        """As autocast casts the arguments of a convolution."""
        castable = self.cast is not None and x.is_floating_point() and x.dtype != torch.float64
        return x.to(self.cast) if castable else x


def gradients_of(
    plan: Plan,
    x: Tensor,
    parameters: Sequence[Tensor],
    kept: list[Tensor],
    dz: Tensor,
    wanted: Sequence[bool],
    last: bool,
) -> Grads:
    """Of the input and the parameters. `kept` is emptied on the way, and overwritten in the last pass."""
    found: Grads = [None] * len(parameters)
    norms = [plan.norm(i, parameters) for i in range(len(plan.layers))]
    dx: Tensor | None = dz
    sums: Tensor | None = None  # over the map of the layer, if the one behind took them
    for i in reversed(range(len(plan.layers))):
        assert dx is not None
        slots, norm, maker = plan.slots[i], norms[i], plan.layers[i].maker
        norm_before = norms[i - 1] if i else None
        mine = [slot for slot in slots[:-3] if slot is not None]
        before = [slot for each in plan.slots[:i] for slot in each if slot is not None]
        asked = [wanted[0] or any(wanted[slot + 1] for slot in before), *(wanted[slot + 1] for slot in mine)]
        own = [plan.lowered(parameters[slot]) for slot in mine]
        of_maker: Grads
        u = kept.pop()
        like = kept[-1] if kept else x
        dilation = plan.layers[i].dilation(like)
        if dilation is None:
            ours = i < len(plan.layers) - 1 and dx.dtype == u.dtype and dx.stride() == u.stride()
            out = dx if ours else u if last else None
            du, *of_norm = ops.bn_act_backward(u, dx, norm, plan.batch[i], out)
            del u, dx, out
            dx, *of_maker = maker.backward(du, plan.source(x, kept, norm_before), like, own, asked)
            del du
            sums = None
        else:
            sums = ops.bn_act_sums(u, dx, norm) if sums is None else sums
            of_norm = [sums[1] * norm.inverse_deviation, sums[0], sums[2]]
            of_x = plan.lowered(like), norm_before
            dx, dweight, sums = ops.asymmetric_conv_backward(
                u, dx, norm, sums, plan.batch[i], *of_x, own[0], dilation, (asked[0], asked[1])
            )
            of_maker = [dweight]
            del u, of_x
        for slot, gradient in zip(slots[-3:], of_norm, strict=True):
            if slot is not None and wanted[slot + 1]:
                p = parameters[slot]
                if p.numel() != len(gradient):  # one slope for all channels
                    gradient = gradient.sum()
                found[slot] = gradient.view(p.shape).to(p.dtype)
        for slot, dparameter in zip(mine, of_maker, strict=True):
            found[slot] = None if dparameter is None else dparameter.to(parameters[slot].dtype)
        if not asked[0]:
            break
    return [dx.to(x.dtype) if wanted[0] and dx is not None else None, *found]


def differentiable(
    plan: Plan, x: Tensor, parameters: Sequence[Tensor], dz: Tensor, wanted: Sequence[bool]
) -> Grads:
    """The gradients with a graph of their own, by aliases, so that no history is counted twice."""
    aliases = [t.view_as(t) if w else t for t, w in zip((x, *parameters), wanted, strict=True)]
    with plan.no_autocast():
        z = plan.plain(aliases[0], aliases[1:])
    asked = [t for t, w in zip(aliases, wanted, strict=True) if w]
    found = iter(torch.autograd.grad(z, asked, dz, create_graph=True, allow_unused=True))
    return [next(found) if w else None for w in wanted]
