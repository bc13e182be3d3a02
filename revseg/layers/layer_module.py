"""A module that a stack runs as one of its layers: linear, then batch norm, then an activation.

What is linear may be more than a convolution: a pyramid of them, or one beside a pool. Such a module says what it
is twice: `plain` calls its parts one after another, `linear` gives the stack the same as one operation and its
parameters. Which of the two runs is decided here.
"""

from __future__ import annotations

from torch import Tensor, nn

from revseg.engine.tracing import Unscriptable, has_hooks
from revseg.layers.bands.cut import Bands
from revseg.layers.linear import LinearOp
from revseg.layers.stack import bands_of, run_row, stacks_are_right
from revseg.layers.stack_layer import Layer, layer_of

Linear = tuple[
    LinearOp, tuple[Tensor | None, ...]
]  # the operation, and its parameters, None for those it lacks


class LayerModule(Unscriptable, nn.Module):
    """Called alone it is a stack of one layer; `Stack` asks for `as_layer` and joins it to its neighbours.

    A subclass has `norm`, batch norm and activation in a row, and defines `linear` and `plain`.
    """

    norm: nn.Sequential
    bands: Bands | None = None  # by which it runs where training asks for it, called alone
    save_activations = False  # True for whole maps nevertheless

    def linear(self) -> Linear | None:
        """What comes before `norm`; None if it has become something else, or if something waits for the call of a part."""
        raise NotImplementedError

    def plain(self, x: Tensor) -> Tensor:
        """The output by the modules, one after another: the definition of the layer."""
        raise NotImplementedError

    def as_layer(self) -> Layer | None:
        """This module as a layer of a stack; None if only `plain` is right."""
        linear = self.linear()
        if linear is None or len(self.norm) != 2 or has_hooks(self.norm):
            return None
        return layer_of(*linear, *self.norm)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.as_layer() if stacks_are_right(x) else None
        return self.plain(x) if layer is None else run_row([layer], x, bands_of(self))
