"""Layers in a row that keep one raw map each.

A layer makes a raw map (a convolution), batch norm and an activation follow. Plain PyTorch keeps
the input of each of the three. A stack keeps the input of the first layer, the raw map of every
layer and two vectors a batch norm: whatever lies between is computed again where the backward pass
needs it, block by block (`revseg.kernels.bn_act`), and gradients reuse each other's memory.

Statistics go through `remember`, so that a layer that runs twice in a training step computes them
once and counts its batch once.

The plain twin are the modules themselves, called one after another. They run instead of a stack
when anything could notice the difference: hooks, parametrized weights, tracing, transforms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.modules import module as hooks_of_all

from revseg import ops
from revseg.makers import Convolution, Grads, Source
from revseg.observers import has_hooks, is_traced
from revseg.remember import remember
from revseg.stack_layer import Layer, layer_of

Coupled = tuple[Tensor, torch.dtype | None]  # a sum, and the dtype of what was added; or a value, not added


class Stack(nn.Sequential):
    """`nn.Sequential`, of which neighbouring layers keep one raw map each.

    A layer is a convolution, transposed or not, the batch norm behind it and the activation behind
    that, as three modules of the row; or one module with a method `as_layer`, which gives a `Layer`
    or None, like `ConvBNAct`. Other modules are called. Stacks inside of stacks count as their
    modules. Names in the state dict are those of `nn.Sequential`.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not stacks_are_right(x):
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]
        return _run_stack(self.flat(), x)[0]

    def coupled(self, x: Tensor, stream: Tensor, sign: int) -> Coupled:
        """`stream + sign * self(x)` in one pass, without the second summand as a map; or `self(x)`, where that cannot be.

        The gradient of the sum is taken for that of `self(x)`, without the sign: this is for the engine of reversible
        sequences, which knows what becomes of the stream's.
        """
        if not stacks_are_right(x) or has_hooks(self):
            return self(x), None
        return _run_stack(self.flat(), x, (stream, sign))

    def flat(self) -> Iterator[nn.Module]:
        """The modules of this stack and of those in it."""
        for module in self:
            if type(module) is Stack and not has_hooks(module):
                yield from module.flat()
            else:
                yield module


def _run_stack(modules: Iterable[nn.Module], x: Tensor, onto: tuple[Tensor, int] | None = None) -> Coupled:
    layers: list[Layer] = []
    row = list(modules)
    while row:
        layer, length = _first_layer(row)
        if layer is None:
            x = row[0](run_layers(layers, x) if layers else x)
            layers = []
        else:
            layers.append(layer)
        del row[:length]
    if layers and onto is not None:
        return _run_layers(layers, x, onto)
    return run_layers(layers, x) if layers else x, None


def _first_layer(row: Sequence[nn.Module]) -> tuple[Layer | None, int]:
    """The layer that the row begins with, None if it begins with another module; and how many modules it is."""
    first = row[0]
    as_layer = getattr(first, "as_layer", None)
    if callable(as_layer):
        return None if has_hooks(first) else as_layer(), 1
    if len(row) < 2 or not isinstance(first, (nn.Conv2d, nn.ConvTranspose2d)):
        return None, 1
    parameters = first.weight, first.bias
    for length, act in ((3, row[2] if len(row) > 2 else None), (2, nn.Identity())):
        layer = None if act is None else layer_of(Convolution.of(first), parameters, row[1], act)
        if layer is not None:
            return layer, length
    return None, 1


def stacks_are_right(x: Tensor) -> bool:
    """Whether this input may go through a stack, and not through the modules themselves."""
    return (
        ops.kernels_are_on()
        and not (torch.compiler.is_compiling() and not torch.is_grad_enabled())  # for inference, one graph
        and not is_traced([x])
        and x.ndim == 4
        and x.numel() > 0
        and not hooks_of_all._global_forward_hooks
        and not hooks_of_all._global_forward_pre_hooks
        and not hooks_of_all._global_backward_hooks
        and not hooks_of_all._global_backward_pre_hooks
    )


def run_layers(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """The output of one stack."""
    return _run_layers(layers, x, None)[0]


@_disable_dynamo
def _run_layers(layers: Sequence[Layer], x: Tensor, onto: tuple[Tensor, int] | None) -> Coupled:
    plan = _Plan(layers, x, onto)
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in plan.parameters)):
        output = _Stack.apply(plan, x, *plan.parameters)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            output = plan.forward(x, plan.parameters, None)
    return output, plan.coupled


class _Plan:
    """What is fixed about one run of a stack: makers, settings, which parameter is whose."""

    def __init__(self, layers: Sequence[Layer], x: Tensor, onto: tuple[Tensor, int] | None) -> None:
        self.layers = layers
        self.onto = onto
        self.coupled: torch.dtype | None = None  # that of the output before it was added, if it was
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
        self.cast: torch.dtype | None = None
        if torch.amp.is_autocast_available(self.device) and torch.is_autocast_enabled(self.device):
            self.cast = torch.get_autocast_dtype(self.device)

    def forward(self, x: Tensor, parameters: Sequence[Tensor], kept: list[Tensor] | None) -> Tensor:
        """The output; `kept` receives the raw maps, and `statistics` their means and variances."""
        self.statistics: list[tuple[Tensor, Tensor]] = []
        with self.no_autocast():
            for i, layer in enumerate(self.layers):
                own = [self.lowered(p) for p in self.of_maker(i, parameters)]
                like = kept[-1] if kept else x
                dilation = layer.dilation(like)
                if dilation is None:
                    made = layer.maker.make(self.source(i, x, parameters, kept), like, own, i > 0)
                    statistics = remember(partial(layer.statistics, made))
                else:
                    raw, norm = self.lowered(like), self.norm_before(i, parameters)
                    made, statistics = layer.convolve(raw, norm, own[0], dilation)
                self.statistics.append(statistics)
                if kept is not None:
                    kept.append(made)
                elif i < len(self.layers) - 1:
                    reads_raw = self.layers[i + 1].dilation(made) is not None
                    x = made if reads_raw else ops.bn_act(made, self.norm(i, parameters), out=made)
            return self.finish(made, self.norm(i, parameters), made if kept is None else None)

    def finish(self, u: Tensor, norm: ops.Norm, out: Tensor | None) -> Tensor:
        """The output of the last layer, added to the stream if there is one that fits."""
        (stream, sign), self.onto = self.onto or (None, 0), None
        fits = stream is not None and stream.shape == u.shape
        if stream is None or not fits or torch.promote_types(u.dtype, stream.dtype) != stream.dtype:
            return ops.bn_act(u, norm, out=out)
        self.coupled = u.dtype
        return ops.bn_act_add(u, norm, stream, sign)

    def source(
        self, i: int, x: Tensor, parameters: Sequence[Tensor], kept: Sequence[Tensor] | None
    ) -> Source:
        """The input of layer i: of the stack, or computed from the raw map of the layer before, if that was kept."""
        if not kept:
            return lambda pick: self.lowered(pick(x))
        u, norm = kept[-1], self.norm(i - 1, parameters)
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

    def norm_before(self, i: int, parameters: Sequence[Tensor]) -> ops.Norm | None:
        """What follows the raw map that layer i reads; None for the input of the stack."""
        return self.norm(i - 1, parameters) if i else None

    def no_autocast(self) -> AbstractContextManager[Any]:
        """Arguments are cast here: autocast would keep casts that were made without a graph."""
        return torch.autocast(self.device, enabled=False) if self.cast else nullcontext()

    def lowered(self, x: Tensor) -> Tensor:
        """As autocast casts the arguments of a convolution."""
        castable = self.cast is not None and x.is_floating_point() and x.dtype != torch.float64
        return x.to(self.cast) if castable else x


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, *parameters: Tensor) -> Tensor:
        kept: list[Tensor] = []
        z = plan.forward(x, parameters, kept)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *parameters, *kept)
        return z

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, dz: Tensor | None) -> Any:
        plan: _Plan = ctx.plan
        count = len(plan.parameters)
        if dz is None:
            return (None,) * (count + 2)
        wanted = ctx.needs_input_grad[1:]
        x, *rest = ctx.saved_tensors
        parameters, kept = rest[:count], rest[count:]
        del rest
        if torch.is_grad_enabled():
            return None, *_differentiable(plan, x, parameters, dz, wanted)
        ctx.maybe_clear_saved_tensors()  # raw maps are freed as they are used
        with plan.no_autocast():
            return None, *_gradients(plan, x, parameters, kept, dz, wanted, _is_last_pass(ctx))


def _is_last_pass(ctx: Any) -> bool:
    """Whether saved tensors are gone, so that no other backward pass (`retain_graph`) will need them."""
    try:
        return not ctx.saved_tensors
    except RuntimeError:
        return True


def _gradients(
    plan: _Plan,
    x: Tensor,
    parameters: Sequence[Tensor],
    kept: list[Tensor],
    dz: Tensor,
    wanted: Sequence[bool],
    last: bool,
) -> Grads:
    """Of the input and the parameters. `kept` is emptied on the way, and overwritten in the last pass."""
    found: Grads = [None] * len(parameters)
    dx: Tensor | None = dz
    sums: Tensor | None = None  # over the map of the layer, if the one behind took them
    for i in reversed(range(len(plan.layers))):
        assert dx is not None
        slots, norm, maker = plan.slots[i], plan.norm(i, parameters), plan.layers[i].maker
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
            dx, *of_maker = maker.backward(du, plan.source(i, x, parameters, kept), like, own, asked)
            del du
            sums = None
        else:
            sums = ops.bn_act_sums(u, dx, norm) if sums is None else sums
            of_norm = [sums[1] * norm.inverse_deviation(), sums[0], sums[2]]
            of_x = plan.lowered(like), plan.norm_before(i, parameters)
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


def _differentiable(
    plan: _Plan, x: Tensor, parameters: Sequence[Tensor], dz: Tensor, wanted: Sequence[bool]
) -> Grads:
    """The gradients with a graph of their own, by aliases, so that no history is counted twice."""
    aliases = [t.view_as(t) if w else t for t, w in zip((x, *parameters), wanted, strict=True)]
    with plan.no_autocast():
        z = plan.plain(aliases[0], aliases[1:])
    asked = [t for t, w in zip(aliases, wanted, strict=True) if w]
    found = iter(torch.autograd.grad(z, asked, dz, create_graph=True, allow_unused=True))
    return [next(found) if w else None for w in wanted]
