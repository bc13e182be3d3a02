"""Maps that wait: they have a shape, and values only once somebody looks at them.

A network joins maps, raises them, upsamples its logits. Who reads the result next may need no more than what it is made of. So
inside of a fitted network such a function can give a tensor without values: whoever knows it takes what it is made of, and
whatever else looks at it finds it made, as ever. So no network has to be known by name, and every result is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from revseg.tensors import LINEAR

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from typing_extensions import Self

_DESCRIPTIONS = {  # what does not look at values
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")
    ),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.ndimension),
}
_INTERPOLATE = (
    "input",
    "size",
    "scale_factor",
    "mode",
    "align_corners",
    "recompute_scale_factor",
    "antialias",
)


class Waiting(Tensor):
    """A map that a function of PyTorch has not made yet.

    Args:
        shape: Of the map.
        like: A tensor of its dtype, on its device.
        function: What makes it.
        args: What that is called with.
        kwargs: The same.
        requires_grad: Whether it has a gradient where nothing that it is made of has one.

    Raises:
        RuntimeError: When it is made, if what it is made of was written to in the meantime.
    """

    is_recipe: ClassVar[bool] = True  # whether what runs again may make it, from what it is made of
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    full: Tensor | None
    version: int
    versions: list[tuple[Tensor, int]]
    casting: AbstractContextManager[Any]

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        like: Tensor,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        requires_grad: bool = False,
    ) -> Self:
        pieces = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            tuple(shape),
            dtype=like.dtype,
            device=like.device,
            requires_grad=requires_grad or any(x.requires_grad for x in pieces),
        )
        made.function, made.args, made.kwargs, made.full, made.version = function, args, kwargs, None, 0
        made.versions = [(x, x._version) for x in pieces if not isinstance(x, Waiting)]
        made.casting = _as_now(like.device.type)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DESCRIPTIONS:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        args, kwargs = materialized((args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise RuntimeError(f"{func} does not go through Python, where a map that waits would be made for it")

    def follows(self) -> bool:
        """Whether the map is what its pieces give: nobody has written to it since it was made.

        Raises:
            RuntimeError: If it was not made yet, and somebody has written to a piece.
        """
        stand = all(x._version == version for x, version in self.versions)
        if not stand and self.full is None:
            raise RuntimeError(
                f"expected what {getattr(self.function, '__name__', 'a row')} was called with to stay as it is until its result is read, got a map "
                "that was written to since then; give what writes to it a copy, or fit with bands=False"
            )
        return stand and (self.full is None or self.full._version == self.version)

    def make(self) -> Tensor:
        """The map with its graph, made once: whoever writes to it writes to this one."""
        if self.full is None:
            self.follows()
            args, kwargs = materialized((self.args, self.kwargs))
            with torch._C.DisableTorchFunction(), torch.enable_grad(), self.casting:
                self.full = self.function(*args, **kwargs)
            self.version = self.full._version
        return self.full

    def made_for_now(self) -> Tensor:
        """The map without a graph, for one use."""
        if self.full is not None:
            return self.full
        self.follows()
        args, kwargs = tree_map_only(Waiting, lambda x: x.made_for_now(), (self.args, self.kwargs))
        with torch._C.DisableTorchFunction(), torch.no_grad(), self.casting:
            made: Tensor = self.function(*args, **kwargs)
        return made


def _as_now(device: str) -> AbstractContextManager[Any]:
    """Autocast as it is now."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, torch.get_autocast_dtype(device), enabled=on)


def materialized(value: Any) -> Any:
    """The value with maps in the places of those that wait."""
    return tree_map_only(Waiting, lambda x: x.make(), value)


def linear_upsampling(given: dict[str, Any]) -> tuple[Tensor | None, tuple[int, ...], bool]:
    """Of a call of `F.interpolate` the map, its new size and `align_corners`, if it is linear upsampling of an exact scale; else None."""
    low = given["input"]
    no: tuple[None, tuple[int, ...], bool] = None, (), False
    if given.get("antialias") or not low.is_floating_point():
        return no
    if LINEAR.get(low.ndim) != given.get("mode", "nearest"):
        return no
    new = new_size(given)
    if new is None or math.prod(new) <= math.prod(low.shape[2:]):
        return no
    return low, new, bool(given.get("align_corners"))


def new_size(given: dict[str, Any]) -> tuple[int, ...] | None:
    """The size that a call of `F.interpolate` asks for; None where the scale that was asked for is not that of the sizes."""
    size, scale, old = given.get("size"), given.get("scale_factor"), tuple(given["input"].shape[2:])
    if size is None:
        scales = tuple(scale) if isinstance(scale, (tuple, list)) else (scale,) * len(old)
        exact = [n * s for n, s in zip(old, scales, strict=True)]
        if any(x != math.floor(x) for x in exact):
            return None
        size = exact
    return tuple(int(n) for n in (size if isinstance(size, (tuple, list)) else (size,) * len(old)))


def of_interpolate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `F.interpolate` by name."""
    return dict(zip(_INTERPOLATE, args, strict=False)) | kwargs
