"""One run of a stack: what is fixed about it, the way forward, and the way back.

`revseg.layers.stack` says what a stack keeps. Here is the arithmetic: which parameter belongs to which layer, how a
raw map follows from the one before, and gradients that reuse each other's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from revseg import ops
from revseg.engine.function import Coupled, Onto
from revseg.engine.gradients import Grads
from revseg.layers.asymmetric_convolution import fused
from revseg.layers.layer_input import LayerInput, lowered
from revseg.layers.linear import LayerEnd
from revseg.layers.norms import Followed, bn_act, bn_act_add, is_elementwise
from revseg.layers.stack_layer import Layer
from revseg.replay.context import is_casting, without_autocast


class Plan:
    """What is fixed about one run of a stack: linear ops, settings, which parameter is whose."""

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
        self.ops = [fused(layer.op, layer.parameters) for layer in layers]
        self.batch = [layer.uses_batch() for layer in layers]
        self.device = x.device.type
        self.cast = torch.get_autocast_dtype(self.device) if is_casting(self.device) else None

    def forward(
        self, x: Tensor, parameters: Sequence[Tensor], kept: list[Tensor] | None, onto: Onto | None
    ) -> Coupled:
        """The output; `kept` receives the raw maps, and `statistics` their means and variances."""
        self.statistics: list[tuple[Tensor, Tensor]] = []
        last = len(self.layers) - 1
        read = self.input(x)
        with self.no_autocast():
            for i, (layer, op) in enumerate(zip(self.layers, self.ops, strict=True)):
                u, statistics = layer.run(op, read, self.of_op(i, parameters))
                self.statistics.append(statistics)
                read = LayerInput(u, self.norm(i, parameters), computed=True)
                if kept is not None:
                    kept.append(u)
                elif i < last and not self.ops[i + 1].activates_its_input:
                    read = read.overwritten()
            assert read.norm is not None
            return self.finish(u, read.norm, u if kept is None else None, onto)

    def finish(self, u: Tensor, norm: ops.Norm, out: Tensor | None, onto: Onto | None) -> Coupled:
        """The output of the last layer, added to the stream if there is one that fits."""
        stream, sign = onto or (None, 0)
        fits = stream is not None and stream.shape == u.shape
        if stream is None or not fits or torch.promote_types(u.dtype, stream.dtype) != stream.dtype:
            return bn_act(u, norm, out=out), None
        return bn_act_add(u, norm, stream, sign), u.dtype

    def input(self, x: Tensor) -> LayerInput:
        """What the first layer reads."""
        return LayerInput(x, cast=self.cast)

    def plain(self, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The output by ordinary autograd, any number of times differentiable."""
        for i, layer in enumerate(self.layers):
            u = layer.op.forward(lowered(x, self.cast), *self.of_op(i, parameters))
            norm, n = self.norm(i, parameters), u
            if self.layers[i].normed:
                batch, running = self.batch[i], self.layers[i].bn.running_mean
                mean, var = (None, None) if batch else (s.to(running.dtype) for s in (norm.mean, norm.var))  # type: ignore[union-attr]
                n = F.batch_norm(u, mean, var, norm.weight, norm.bias, batch, 0.0, norm.eps)
            if isinstance(norm, Followed):
                x = norm.activated(n)
            elif isinstance(norm.slope, Tensor):
                x = F.prelu(n, norm.slope.to(n.dtype))
            else:
                x = F.leaky_relu(n, norm.slope) if norm.slope != 1.0 else n
        return x

    def of_op(self, i: int, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The parameters of a linear op, as autocast casts them."""
        return [lowered(parameters[slot], self.cast) for slot in self.slots[i][:-3] if slot is not None]

    def norm(self, i: int, parameters: Sequence[Tensor]) -> ops.Norm:
        weight, bias, slope = (None if slot is None else parameters[slot] for slot in self.slots[i][-3:])
        mean, var = self.statistics[i]
        layer = self.layers[i]
        if is_elementwise(layer.act):
            return Followed(mean, var, weight, bias, 1.0, layer.bn.eps, layer.act)
        return ops.Norm(
            mean, var, weight, bias, layer.fixed_slope() if slope is None else slope, layer.bn.eps
        )

    def no_autocast(self) -> AbstractContextManager[Any]:
        """Arguments are cast here: autocast would keep casts that were made without a graph."""
        return without_autocast(self.device)  # a backward pass may run under another state


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
        of_op = [slot for slot in plan.slots[i][:-3] if slot is not None]
        before = [slot for each in plan.slots[:i] for slot in each if slot is not None]
        asked = [wanted[0] or any(wanted[slot + 1] for slot in before), *(wanted[slot + 1] for slot in of_op)]
        end = _end(plan, i, norms[i], kept.pop(), dx, sums, last)
        del dx  # `end` lets go of it
        read = LayerInput(kept[-1], norms[i - 1], computed=True) if i else plan.input(x)
        dx, dparameters, dnorm, sums = plan.ops[i].layer_gradients(
            end, read, plan.of_op(i, parameters), asked
        )
        for slot, gradient in zip(plan.slots[i][-3:], dnorm, strict=True):
            if slot is not None and wanted[slot + 1]:
                p = parameters[slot]
                if p.numel() != len(gradient):  # one slope for all channels
                    gradient = gradient.sum()
                found[slot] = gradient.view(p.shape).to(p.dtype)
        for slot, dparameter in zip(of_op, dparameters, strict=True):
            found[slot] = None if dparameter is None else dparameter.to(parameters[slot].dtype)
        del dnorm, dparameters
        if not asked[0]:
            break
    return [dx.to(x.dtype) if wanted[0] and dx is not None else None, *found]


def _end(
    plan: Plan, i: int, norm: ops.Norm, u: Tensor, dz: Tensor | None, sums: Tensor | None, last: bool
) -> LayerEnd:
    """Where the gradient dz enters a layer; its own memory, or that of the raw map, takes what comes of it."""
    assert dz is not None
    ours = i < len(plan.layers) - 1 and dz.dtype == u.dtype and dz.stride() == u.stride()
    return LayerEnd(u, dz, norm, plan.batch[i], dz if ours else u if last else None, sums)


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
