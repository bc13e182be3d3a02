"""A layer as a stack sees it: a linear op that makes raw maps, a norm, an activation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revseg import ops
from revseg.engine.tracing import has_hooks
from revseg.layers.layer_input import LayerInput
from revseg.layers.linear import LinearOp
from revseg.layers.norms import is_elementwise
from revseg.replay.memo import remember

_ACTS = (nn.PReLU, nn.LeakyReLU, nn.ReLU, nn.Identity)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}  # by the dimensions of a map
_INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_BY_IMAGE = tuple(
    _INSTANCE_NORMS.values()
)  # no union of types, which the compiler of torch 2.8 does not know


@dataclass(frozen=True)
class Layer:
    """What a module tells about itself.

    Args:
        op: Makes the raw map.
        parameters: Of the op; None for those it lacks.
        bn: Batch norm behind it; by bands also instance norm.
        act: PReLU, LeakyReLU, ReLU or Identity behind that; by bands also any that `revseg.layers.norms.Followed` takes.
        normed: False for a layer without norm: `bn` is one that changes nothing.
    """

    op: LinearOp
    parameters: tuple[Tensor | None, ...]
    bn: BatchNorm | InstanceNorm
    act: nn.Module
    normed: bool = True

    def all_parameters(self) -> list[Tensor | None]:
        slope = self.act.weight if isinstance(self.act, nn.PReLU) else None
        return [*self.parameters, self.bn.weight, self.bn.bias, slope]

    def by_channel(self) -> Tensor | None:
        """A value, or several, for each channel of the raw map; None if the layer has none at hand."""
        local = self.op.window() is not None and self.parameters
        candidates = self.bn.weight, self.bn.running_mean, self.parameters[0] if local else None
        return next((each for each in candidates if each is not None), None)

    def fixed_slope(self) -> float:
        if isinstance(self.act, nn.LeakyReLU):
            return float(self.act.negative_slope)
        return 0.0 if isinstance(self.act, nn.ReLU) else 1.0

    def is_linear(self) -> bool:
        """Whether neither norm nor activation follows the raw map."""
        return not self.normed and isinstance(self.act, nn.Identity)

    def uses_batch(self) -> bool:
        """Whether statistics are those of the values, of all images or of each."""
        return self.bn.training or (self.bn.running_mean is None and self.bn.running_var is None)

    def is_by_image(self) -> bool:
        """Whether statistics are those of each image."""
        return isinstance(self.bn, _BY_IMAGE) and self.uses_batch()

    def run(
        self, op: LinearOp, x: LayerInput, parameters: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The raw map that this op makes, and mean and variance to normalise it by.

        Statistics of the batch are taken, and running ones moved on, if no run before has done so.
        """
        made: list[Tensor] = []
        assert not self.is_by_image(), "expected statistics of a batch: images go by bands"

        def statistics() -> tuple[Tensor, Tensor]:
            if not self.uses_batch():
                return self.running()
            u, of_batch = op.make_with_statistics(x, parameters)
            made.append(u)
            self.move_running(u.shape, *of_batch)
            return of_batch

        found = remember(statistics)
        return made[0] if made else op.make(x, parameters), found

    def running(self) -> tuple[Tensor, Tensor]:
        """The running mean and variance as they are now [C], float64 where the device has it."""
        running: tuple[Any, Any] = self.bn.running_mean, self.bn.running_var
        wide = ops.widest(running[0].device)
        mean, var = (each.to(wide, copy=True) for each in running)  # training moves them on
        return mean, var

    def move_running(self, shape: Sequence[int], mean: Tensor, var: Tensor) -> None:
        """Move running statistics on by those of a batch, of a raw map of this shape.

        Those of each image [N, C] count as their mean, in one batch that nobody counts.
        """
        bn: Any = self.bn
        self.verify(shape)
        if not self.moves():
            return
        values, batches = math.prod(shape) // shape[1], bn.num_batches_tracked
        if self.is_by_image():
            mean, var, values, batches = mean.mean(0), var.mean(0), values // shape[0], None
        ops.move_statistics(bn.running_mean, bn.running_var, batches, mean, var, values, bn.momentum)

    def moves(self) -> bool:
        """Whether a run moves running statistics on."""
        return self.bn.training and self.bn.running_mean is not None and self.bn.running_var is not None

    def verify(self, shape: Sequence[int]) -> None:
        """Refuses raw maps of a shape of which there are no statistics, as PyTorch does."""
        functional: Any = F
        verify = functional._verify_spatial_size if self.is_by_image() else functional._verify_batch_size
        verify(list(shape))


def layer_without_norm(
    op: LinearOp | None, parameters: tuple[Tensor | None, ...], act: nn.Module, like: Tensor | None
) -> Layer | None:
    """A layer of an op and an activation, for rows by bands; None if the latter is not known.

    Args:
        op: The op.
        parameters: Of the op.
        act: The activation.
        like: A value for each channel [C, ...], on the device of the layer; None if there is none.
    """
    if op is None or like is None or type(act) not in _ACTS or has_hooks(act):
        return None
    bn: Any = NORMS[op.dims](len(like), eps=0.0, affine=False, device=like.device, dtype=torch.float32)
    return Layer(op, parameters, bn.eval(), act, normed=False)


def layer_of(
    op: LinearOp | None, parameters: tuple[Tensor | None, ...], bn: nn.Module, act: nn.Module
) -> Layer | None:
    """A layer of these parts; None if a stack does not know one of them."""
    known = op is not None and type(bn) is NORMS[op.dims] and type(act) in _ACTS
    if op is None or not known or has_hooks(bn, act):
        return None
    return Layer(op, parameters, bn, act)  # type: ignore[arg-type]


def layer_by_image(
    op: LinearOp | None, parameters: tuple[Tensor, ...], norm: nn.Module, act: nn.Module
) -> Layer | None:
    """A layer of an op that is local, instance norm and activation, for rows by bands; None if one of them is not known."""
    known = op is not None and type(norm) is _INSTANCE_NORMS[op.dims] and type(act) in _ACTS
    if op is None or op.window() is None or not known or has_hooks(norm, act):
        return None
    bn: Any = norm
    tracks = {bn.running_mean is not None, bn.running_var is not None, bn.track_running_stats}
    fits = bn.num_features == len(parameters[0]) and len(tracks) == 1
    return Layer(op, parameters, bn, act) if fits else None


def with_elementwise(layer: Layer | None, act: nn.Module) -> Layer | None:
    """A layer for rows by bands with an activation behind it that the passes do not know; None if it has another, or this is none."""
    if layer is None or type(layer.act) is not nn.Identity or not is_elementwise(act) or has_hooks(act):
        return None
    return replace(layer, act=act)


def go_together(layers: Sequence[Layer]) -> bool:
    """Whether a row has no statistics of each image beside such of a batch, or beside ops that are not local."""
    joining = [layer for layer in layers if layer.uses_batch() or layer.op.window() is None]
    return len({layer.is_by_image() for layer in joining}) < 2
