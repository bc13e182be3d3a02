"""Layers in a row that keep one raw map each.

A layer makes a raw map (a convolution), batch norm and an activation follow. Plain PyTorch keeps
the input of each of the three. A stack keeps the input of the first layer, the raw map of every
layer and two vectors a batch norm: whatever lies between is computed again where the backward pass
needs it, block by block (`revseg.ops.bn_act`), and gradients reuse each other's memory.

Statistics go through `remember`, so that a layer that runs twice in a training step computes them
once and counts its batch once.

The plain twin are the modules themselves, called one after another. They run instead of a stack
when anything could notice the difference: hooks, parametrized weights, tracing, transforms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.modules import module as hooks_of_all

from revseg import ops
from revseg.engine.function import Coupled, Differentiate, Function, Onto
from revseg.engine.gradients import Grads, total
from revseg.engine.tracing import Unscriptable, has_hooks, is_traced
from revseg.layers.bands.cut import BandPlan, Bands
from revseg.layers.bands.row import BandedRow
from revseg.layers.bands.rows import Whole
from revseg.layers.bands.run import run_by_bands
from revseg.layers.stack_layer import Layer, go_together
from revseg.layers.stack_pass import Plan, differentiable, gradients_of
from revseg.layers.stack_row import layers_in, parts_in
from revseg.replay.memo import noting, reminding
from revseg.tensors import is_plain


class Stack(Unscriptable, nn.Sequential):
    """`nn.Sequential`, of which neighbouring layers keep one raw map each.

    A layer is a convolution of one, two or three dimensions, transposed or not, the batch norm behind it and the
    activation behind that, as three modules of the row; or one module with a method `as_layer`, which gives a `Layer`
    or None, like `ConvBNAct`. Other modules are called. Stacks inside of stacks count as their
    modules. Names in the state dict are those of `nn.Sequential`.
    """

    any_memory_format = True  # for the engine, which may lay out streams as convolutions want them

    bands: Bands | None = None  # by which layers that are local run, where training asks for it
    save_activations = False  # True for whole maps nevertheless

    def forward(self, x: Tensor) -> Tensor:
        if not stacks_are_right(x, (1, 2, 3)):
            return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]
        return _run_stack(self.flat(), x, bands_of(self))

    def layers_by_bands(self, x: Tensor, part: nn.Module | None = None) -> Sequence[Layer] | None:
        """The layers of the stack, or of a part of it, if all of a map x would go through them by bands; else None."""
        if bands_of(self) is None or has_hooks(self) or not stacks_are_right(x, (1, 2, 3)):
            return None
        layers = layers_of(self if part is None else part, x.ndim - 2, without_norm=True)
        return layers if layers and BandPlan.takes(layers, x) else None

    def as_function(self, x: Tensor, *side: Any) -> Function | None:
        """This stack as a function that needs no graph, in one run; None if it is more than layers, or must not run as such."""
        if side or not stacks_are_right(x, (1, 2, 3)):
            return None
        bands = None if self.save_activations or x.ndim < 4 else self.bands  # signals round by their length
        layers = None if bands is None else layers_of(self, x.ndim - 2, without_norm=True)
        if bands is not None and layers and BandPlan.takes(layers, x):
            return BandedRow(layers, Whole(x), bands)
        layers = layers_of(self, x.ndim - 2)
        return _Row(layers, x) if layers else None

    def flat(self) -> Iterator[nn.Module]:
        """The modules of this stack and of those in it."""
        for module in self:
            if type(module) is Stack and not has_hooks(module):
                yield from module.flat()
            else:
                yield module


def bands_of(module: Any) -> Bands | None:
    """How maps are cut in this call of a module; None for whole maps, as in inference, which has the bits of all levels."""
    trains = module.training or torch.is_grad_enabled()
    whole = module.save_activations or not trains or torch.compiler.is_compiling()
    return None if whole else module.bands


def _run_stack(modules: Iterable[nn.Module], x: Tensor, bands: Bands | None) -> Tensor:
    layers: list[Layer] = []
    for part in parts_in(modules, x.ndim - 2, bands is not None):
        if isinstance(part, Layer) and go_together([*layers, part]):
            layers.append(part)
            continue
        x = run_row(layers, x, bands) if layers else x
        layers = [part] if isinstance(part, Layer) else []
        x = x if isinstance(part, Layer) else part(x)
    return run_row(layers, x, bands) if layers else x


def run_row(layers: Sequence[Layer], x: Tensor, bands: Bands | None) -> Tensor:
    """The output of layers, by bands if all are local."""
    if bands is not None and BandPlan.takes(layers, x):
        return run_by_bands(layers, (x,), bands)[0]
    return run_layers(layers, x)


def layers_of(module: nn.Module, dims: int = 2, without_norm: bool = False) -> list[Layer] | None:
    """The layers of a stack, or a module that is one layer; None if it is more than layers.

    Args:
        module: The stack, or the layer.
        dims: Of the maps.
        without_norm: Whether a convolution that no norm follows, or instance norm, is a layer, as it is by bands.
    """
    return layers_in(module.flat() if isinstance(module, Stack) else [module], dims, without_norm)


def stacks_are_right(x: Tensor, dims: Sequence[int] = (2,)) -> bool:
    """Whether this input, a map of so many dimensions, may go through a stack, and not through the modules themselves."""
    return (
        ops.kernels_are_on()
        and not (torch.compiler.is_compiling() and not torch.is_grad_enabled())  # for inference, one graph
        and not is_traced([x])
        and x.ndim - 2 in dims
        and x.numel() > 0
        and is_plain(x)
        and not hooks_of_all._global_forward_hooks
        and not hooks_of_all._global_forward_pre_hooks
        and not hooks_of_all._global_backward_hooks
        and not hooks_of_all._global_backward_pre_hooks
    )


def run_layers(layers: Sequence[Layer], x: Tensor) -> Tensor:
    """The output of one stack."""
    return _run_layers(layers, x)


@_disable_dynamo
def _run_layers(layers: Sequence[Layer], x: Tensor) -> Tensor:
    plan = Plan(layers, x)
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in plan.parameters)):
        return _Stack.apply(plan, x, *plan.parameters)  # type: ignore[no-any-return, no-untyped-call]
    with torch.no_grad():
        return plan.forward(x, plan.parameters, None, None)[0]


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, *parameters: Tensor) -> Tensor:
        kept: list[Tensor] = []
        output, _ = plan.forward(x, parameters, kept, None)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *parameters, *kept)
        return output

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, dz: Tensor | None) -> Any:
        plan: Plan = ctx.plan
        count = len(plan.parameters)
        if dz is None:
            return (None,) * (count + 2)
        wanted = ctx.needs_input_grad[1:]
        x, *rest = ctx.saved_tensors
        parameters, kept = rest[:count], rest[count:]
        del rest
        if torch.is_grad_enabled():
            return None, *differentiable(plan, x, parameters, dz, wanted)
        ctx.maybe_clear_saved_tensors()  # raw maps are freed as they are used
        with plan.no_autocast():
            return None, *gradients_of(plan, x, parameters, kept, dz, wanted, _is_last_pass(ctx))


def _is_last_pass(ctx: Any) -> bool:
    """Whether saved tensors are gone, so that no other backward pass (`retain_graph`) will need them."""
    try:
        return not ctx.saved_tensors
    except RuntimeError:
        return True


class _Row:
    """A run of layers without a graph (`revseg.engine.function.Function`)."""

    def __init__(self, layers: Sequence[Layer], x: Tensor) -> None:
        self.plan = Plan(layers, x)
        self.tensors = self.plan.parameters

    @torch.no_grad()
    def run(self, x: Tensor, onto: Onto | None) -> Coupled:
        with noting() as self.noted:
            return self.plan.forward(x, self.tensors, None, onto)

    @torch.no_grad()
    def rerun(
        self, x: Tensor, tensors: Sequence[Tensor], onto: Onto | None, wanted: Sequence[bool] | None
    ) -> tuple[Coupled, Differentiate | None]:
        asked = wanted if wanted and any(wanted) else None
        kept: list[Tensor] = []  # raw maps, overwritten on the way back
        with reminding(self.noted):
            coupled = self.plan.forward(x, tensors, None if asked is None else kept, onto)
        if asked is None:
            return coupled, None

        def differentiate(dh: Tensor, before: Grads) -> Grads:
            with self.plan.no_autocast():
                found = gradients_of(self.plan, x, tensors, kept, dh, asked, True)
            return [total(more, so_far, dh) for more, so_far in zip(found, before, strict=True)]

        return coupled, differentiate

    def rerun_with_graph(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        with reminding(self.noted):
            return _Stack.apply(self.plan, x, *tensors)  # type: ignore[no-any-return, no-untyped-call]
