"""The output of a row by bands that waits for the convolution behind it: both then go by bands together.

A network calls its classifier as a module of its own. The gradient of the map between would be whole, several times as large
as that of the scores. So a row can hand its map on without having made it; the convolution takes it, and runs the row and
itself as one. Whatever else looks at the map finds it made, as ever. Where whole channels are dropped between, as heads of
segmentation networks do, they are chosen then, as ever, and the map waits on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from revseg.memory.waiting import Waiting, is_step
from revseg.replay.context import is_casting

if TYPE_CHECKING:
    from typing_extensions import Self

Run = Callable[..., Tensor | None]  # of modules behind the row; None if these do not go by bands
# of channels, by the dimensions of a map [N, C, ...]
_DROPOUTS = {3: F.dropout1d, 4: F.dropout2d, 5: F.dropout3d}
_OF_DROPOUT = ("input", "p", "training", "inplace")


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
    before: tuple[Self, Tensor] | None  # of which channels were dropped, and what by [N, C, 1, ...]

    @staticmethod
    def __new__(cls, shape: Sequence[int], like: Tensor, run: Run, tensors: Sequence[Tensor]) -> Self:
        made = Waiting.__new__(cls, shape, like, run, tuple(tensors), {}, requires_grad=True)
        made.taken, made.cast = False, _cast(like.device.type)
        made.before = None
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DROPOUTS.values():
            given = dict(zip(_OF_DROPOUT, args, strict=False)) | (kwargs or {})
            x = given["input"]
            if func is _DROPOUTS.get(x.ndim) and x.may_be_dropped(given):
                return x.dropped(given.get("p", 0.5))
        return super().__torch_function__(func, types, args, kwargs)

    def may_be_dropped(self, given: dict[str, Any]) -> bool:
        """Whether what a call of dropout gives may wait too.

        Args:
            given: Its arguments, by name.
        """
        waits = self.full is None and self.before is None and is_step()
        return (
            waits
            and bool(given.get("training", True))
            and not given.get("inplace")
            and 0 < given.get("p", 0.5) < 1
        )

    def dropped(self, p: float) -> Self:
        """The map without some of its channels, of which each goes with a probability of p."""
        ones = torch.ones(*self.shape[:2], *(1,) * (self.ndim - 2), dtype=self.dtype, device=self.device)
        found = type(self)(self.shape, ones, self.function, self.args)
        found.before = self, _DROPOUTS[self.ndim](ones, p)
        return found

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
                self.full = self.function() if self.before is None else self.before[0].make() * self.before[1]
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
        before, scale = (self, None) if self.before is None else self.before
        if before.full is not None or before.taken:
            return None
        self.follows()
        found: Tensor | None = self.function(conv, scale=scale)
        self.taken = before.taken = found is not None
        return found


class Dropouts(TorchFunctionMode):
    """While it is on, what channels were dropped of is known of the result, and when.

    Args:
        clock: Says how many operations there were.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        super().__init__()
        self.clock = clock
        self.before: Any = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        began = self.clock()
        result = func(*args, **(kwargs or {}))
        if func in _DROPOUTS.values() and isinstance(result, Tensor):
            given = dict(zip(_OF_DROPOUT, args, strict=False)) | (kwargs or {})
            if result is not given["input"]:
                self.before[result] = id(given["input"]), (began, self.clock())
        return result

    def number(self, x: Any) -> tuple[int, tuple[int, int] | None]:
        """That of an object; if it is what channels were dropped of, that of the one before, and the operations that did it."""
        found: tuple[int, tuple[int, int]] | None = self.before.get(x) if isinstance(x, Tensor) else None
        return found or (id(x), None)


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
