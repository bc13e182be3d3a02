"""A row of layers that keeps its input alone, and goes by bands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revseg.engine.drift import Check
from revseg.engine.tracing import has_hooks, is_traced
from revseg.layers.bands.cut import BandPlan, Bands
from revseg.layers.bands.run import Map, joined, run_by_bands
from revseg.layers.recompute import Recompute
from revseg.layers.stack import layers_of, stacks_are_right
from revseg.layers.stack_layer import Layer
from revseg.replay.call import is_recomputing


def may_go_by_bands(wrapper: Recompute, parts: Sequence[Tensor]) -> bool:
    """Whether maps may go by bands in this call: in training, or where there are gradients, and nobody traces it."""
    traced = torch.compiler.is_compiling() or is_traced(parts)
    inference = not (torch.is_grad_enabled() or wrapper.training)  # has the bits of all levels
    return not (wrapper.save_activations or traced or inference) and all(
        stacks_are_right(part, (1, 2, 3)) for part in parts
    )


class ByBands(Recompute):
    """Layers in a row whose maps are never whole: each exists in some rows at a time, forward and backward.

    ```python
    stem = ByBands(Stack(ConvBNAct(3, 8, stride=2), ConvBNAct(8, 8)))
    y = stem(x)   # keeps x
    ```

    The state dict is that of the module, without a prefix.

    Args:
        module: A `Stack`, or one layer of it, like `ConvBNAct`. Of others, of a row with a layer that is not
            local, and of one with statistics both of the batch and of each image, this is a `Recompute`.
        bands: How maps are cut, and what may be kept whole.
        streams: The output is two tensors, its halves by channels, as a `ReversibleSequence` takes them without a copy.
        ends: It is what a `Recompute` without a check ends with: in the second run nobody reads its output, which is not
            made then, but has a gradient.
        save_activations: True for the plain twin: ordinary autograd, the same numbers.
        check: See `Recompute`; the layers of a row by bands have no hidden state, and are not checked.

    Memory: the input. In the forward pass one raw map, the largest; in the backward pass one, and those that
    `bands.kept` allows; and some bands. With instance norm a raw map is that of one image.

    Numerics: exact, batch norm in training mode too, up to the order of sums: statistics and gradients of weights are sums
    over bands, nearer to those of real numbers than plain PyTorch's.
    """

    def __init__(
        self,
        module: nn.Module,
        bands: Bands | None = None,
        *,
        streams: bool = False,
        ends: bool = False,
        save_activations: bool = False,
        check: Check = "error",
    ) -> None:
        super().__init__(module, save_activations=save_activations, check=check)
        self.bands, self.streams, self.ends = bands or Bands(), streams, ends

    def forward(self, x: Map) -> Any:
        """The output [N, C, h, ...], or its halves.

        Args:
            x: The input [N, C, L], [N, C, H, W] or [N, C, D, H, W], or its halves.
        """
        parts = (x,) if isinstance(x, Tensor) else tuple(x)
        layers = self._layers(parts) if may_go_by_bands(self, parts) else None
        if layers is None:
            y = super().forward(joined(parts))
            return tuple(y.chunk(2, 1)) if self.streams else y
        without = self.ends and is_recomputing() and torch.is_grad_enabled()
        y = run_by_bands(layers, parts, self.bands, self.streams, without)
        return y if self.streams else y[0]

    def _layers(self, parts: Sequence[Tensor]) -> Sequence[Layer] | None:
        """The layers of the module; None if it does not go by bands."""
        if has_hooks(self.module):
            return None
        layers = layers_of(self.module, parts[0].ndim - 2, without_norm=True)
        return layers if layers and BandPlan.takes(layers, parts[0]) else None
