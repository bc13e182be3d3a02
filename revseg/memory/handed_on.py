"""The output of a row by bands that waits for the convolution behind it: both then go by bands together.

A network calls its classifier as a module of its own. The gradient of the map between would be whole, several times as large
as that of the scores. So a row can hand its map on without having made it; the convolution takes it, and runs the row and
itself as one. Whatever else looks at the map finds it made, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from revseg.memory.waiting import Waiting, is_step
from revseg.replay.context import is_casting

if TYPE_CHECKING:
    from typing_extensions import Self

Run = Callable[..., Tensor | None]  # of modules behind the row; None if these do not go by bands


class HandedOn(Waiting):
    """What a row by bands makes, not made yet.

    Args:
        shape: Of the map.
        like: A tensor of its dtype, on its device.
        run: Runs the row, and modules behind it.
        tensors: What it reads.

    Raises:
        RuntimeError: When somebody looks at it after a convolution has taken it.
    """

    is_recipe = False  # the row has parameters, and counts a batch
    taken: bool
    cast: torch.dtype | None

    @staticmethod
    def __new__(cls, shape: Sequence[int], like: Tensor, run: Run, tensors: Sequence[Tensor]) -> Self:
        made = Waiting.__new__(cls, shape, like, run, tuple(tensors), {}, requires_grad=True)
        made.taken, made.cast = False, _cast(like.device.type)
        return made

    def make(self) -> Tensor:
        """The map with its graph, made once."""
        if self.taken:
            raise RuntimeError(
                "expected a map that one convolution alone reads, as when the plan was made, got another reader: fit "
                "the network anew, with what it does now"
            )
        if self.full is None:
            self.follows()
            with torch.set_grad_enabled(self.graph), self.casting:
                self.full = self.function()
            assert self.full is not None
            self.version = self.full._version
        return self.full

    def made_for_now(self) -> Tensor:
        """The same: running the row a second time would count a batch twice."""
        return self.make()

    def with_next(self, conv: nn.Module) -> Tensor | None:
        """What the row and a convolution behind it make; None if they do not go by bands together, or the map is there already."""
        if self.full is not None or not is_step() or _cast(self.device.type) != self.cast:
            return None
        self.follows()
        found: Tensor | None = self.function(conv)
        self.taken = found is not None
        return found


class TakesIn(nn.Module):
    """A convolution that takes in the row before it, where that hands its map on.

    Args:
        conv: The convolution.
        plain: What it does else.
    """

    def __init__(self, conv: nn.Module, plain: nn.Module) -> None:
        super().__init__()
        self.conv, self.plain = conv, plain

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], HandedOn):
            together = self._together(args[0])
            if together is not None:
                return together
        return self.plain(*args, **kwargs)

    @_disable_dynamo
    def _together(self, x: HandedOn) -> Tensor | None:
        return x.with_next(self.conv)


def _cast(device: str) -> torch.dtype | None:
    """The dtype to which autocast casts now."""
    return torch.get_autocast_dtype(device) if is_casting(device) else None
