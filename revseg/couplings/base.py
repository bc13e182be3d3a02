"""A coupling is two pure functions: one updates a stream by a value, the other undoes it.

    y = couple(x, h)         h = fn(source)
    x = uncouple(y, h)       the source did not change, so h is found again

The engine inverts, recomputes and differentiates every coupling from these two. They may be class methods, or methods
that use parameters of the coupling, which is a module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from revseg.engine.gradients import edge_of, gradients
from revseg.engine.steps import Step, Streams, Update, run_inverse, run_plain


class Coupling(nn.Module):
    """Two updates: `y1 = couple(x1, f(x2))`, then `y2 = couple(x2, g(y1))`.

    For a rule of your own, override `couple` and `uncouple`. Both must be pure: no state, no
    randomness, no writing to their arguments. `uncouple(couple(x, h), h)` must be x up to rounding.
    What they use of the coupling's own parameters gets gradients, by autograd through `couple`, whatever
    `gradients` says.

    Args:
        f: Takes a stream, and the side inputs of the sequence, to the value that updates the first stream:
            a module, or a function without parameters.
        g: The same for the second stream.

    Raises:
        TypeError: If f or g cannot be called.
    """

    value_channels = 1  # channels of a function's value per channel of a stream
    additive = False  # whether couple(x, h) is x + h, which exact=True does without rounding

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class that defines `couple` anew inherits nothing that was said of the old one."""
        super().__init_subclass__(**kwargs)
        for name in ("gradients", "additive") if "couple" in vars(cls) else ():
            if name not in vars(cls):
                setattr(cls, name, vars(Coupling)[name])

    def __init__(self, f: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        for name, fn in (("f", f), ("g", g)):
            if not callable(fn):
                raise TypeError(f"expected {name} to be a module or a function, got {type(fn).__name__}")
        self.f, self.g = f, g

    def couple(self, x: Tensor, h: Tensor) -> Tensor:
        """The updated stream, of the shape and dtype of x.

        Args:
            x: The stream [N, C, ...].
            h: The value of the function [N, C * value_channels, ...].
        """
        raise NotImplementedError(f"{type(self).__name__} must define couple(x, h)")

    def uncouple(self, y: Tensor, h: Tensor) -> Tensor:
        """The stream before the update, from the one after it."""
        raise NotImplementedError(f"{type(self).__name__} must define uncouple(y, h)")

    def gradients(self, x: Tensor, h: Tensor, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradients (dx, dh) of `couple` at x, h, None for what it does not use.

        Found by autograd; override to save memory.
        """
        with torch.enable_grad():
            x, h = x.detach().requires_grad_(), h.detach().requires_grad_()
            edge = edge_of(self.couple(x, h))
        dx, dh = gradients([edge], [x, h], [dy], f"{type(self).__name__}.couple")
        return dx, dh

    def steps(self, name: str = "") -> list[Step]:
        """The updates, in the order in which they are applied."""
        name = name or type(self).__name__
        return [
            Update(f"{name}, f", self.f, self, source=1, target=0),
            Update(f"{name}, g", self.g, self, source=0, target=1),
        ]

    def forward(
        self, x1: Tensor, x2: Tensor, *side: Any, run: Callable[..., Any] = run_plain, name: str = ""
    ) -> Streams:
        """The two streams after the block, each of the shape of x1, by ordinary autograd.

        Only inside a `ReversibleSequence` is the backward pass free of activations.
        """
        outputs: Streams = run(self.steps(name), (x1, x2), side)
        return outputs

    def inverse(self, y1: Tensor, y2: Tensor, *side: Any) -> Streams:
        """The two streams before the block."""
        return run_inverse(self.steps(), (y1, y2), side)
