"""Maps that wait: they have a shape, and values only once somebody looks at them.

A network joins maps, raises them, upsamples its logits. Who reads the result next may need no more than what it is made of. So
inside of a fitted network such a function can give a tensor without values: whoever knows it takes what it is made of, and
whatever else looks at it finds it made, as ever. Who differentiates by itself (`torch.autograd.Function`) takes the tensor as it
is and sends its gradient there, so the tensor has a node of autograd too, which passes that on. So no network has to be known by
name, and every result is right.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map_only

from revseg.tensors import LINEAR

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from typing_extensions import Self

_here = threading.local()  # `in_step`: whether a training step goes on in this thread, graph or none
_DESCRIPTIONS = {  # what does not look at values
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "_version")
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


@contextmanager
def training_step() -> Iterator[None]:
    """Inside, a training step goes on where there is no graph too: in the first run of what runs again."""
    before = getattr(_here, "in_step", False)
    _here.in_step = True
    try:
        yield
    finally:
        _here.in_step = before


def is_step() -> bool:
    """Whether what runs here belongs to a training step."""
    return torch.is_grad_enabled() or getattr(_here, "in_step", False)


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
    graph: bool
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
        given = [torch.empty((), requires_grad=True), *pieces] if requires_grad else pieces
        bare = partial(cls._bare, tuple(shape), like)
        casting = _as_now(like.device.type)
        remaking = (function, args, kwargs, casting) if cls.is_recipe else None
        made: Self = _Gradient.apply(bare, remaking, *given)  # type: ignore[no-untyped-call]
        made.function, made.args, made.kwargs, made.full, made.version = function, args, kwargs, None, 0
        made.versions = [(x, x._version) for x in pieces if not isinstance(x, Waiting)]
        made.casting, made.graph = casting, torch.is_grad_enabled()
        return made

    @classmethod
    def _bare(cls, shape: tuple[int, ...], like: Tensor) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
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
        args, kwargs = tree_map_only(Waiting, lambda x: x.made_for_now(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def follows(self) -> bool:
        """Whether the map is what its pieces give: nobody has written to it since it was made.

        Raises:
            RuntimeError: If it was not made yet, and somebody has written to a piece.
        """
        stand = all(x._version == version for x, version in self.versions)
        stand = stand and all(
            x.follows() for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Waiting)
        )
        if not stand and self.full is None:
            raise RuntimeError(
                f"expected what {getattr(self.function, '__name__', 'a row')} was called with to stay as it is until its result is read, got a map "
                "that was written to since then; give what writes to it a copy"
            )
        return stand and (self.full is None or self.full._version == self.version)

    def make(self) -> Tensor:
        """The map, with its graph if there was one then, made once: whoever writes to it writes to this one."""
        if self._version:  # a function that differentiates by itself has written to it, and is its node now
            return _Values.apply(self)  # type: ignore[no-any-return, no-untyped-call]
        if self.full is None:
            self.follows()
            args, kwargs = materialized((self.args, self.kwargs))
            with torch._C.DisableTorchFunction(), torch.set_grad_enabled(self.graph), self.casting:
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


class _Gradient(torch.autograd.Function):
    """Passes the gradient of a map that waits on to what it is made of, for those who read it and differentiate by themselves."""

    @staticmethod
    def forward(ctx: Any, bare: Callable[[], Tensor], remaking: Any, *pieces: Tensor) -> Tensor:
        ctx.remaking = remaking
        return bare()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.remaking is None:
            raise RuntimeError(
                "expected the output of a row by bands to be read by PyTorch's functions, got a gradient of it from a "
                "torch.autograd.Function; fit with bands=False"
            )
        function, args, kwargs, casting = ctx.remaking
        leaves: list[Tensor] = []

        def leaf(x: Tensor) -> Tensor:
            value = x.made_for_now() if isinstance(x, Waiting) else x
            leaves.append(value.detach().requires_grad_(x.requires_grad))
            return leaves[-1]

        with torch._C.DisableTorchFunction(), torch.enable_grad(), casting:
            args, kwargs = tree_map_only(Tensor, leaf, (args, kwargs))
            made = function(*args, **kwargs)
        asked = [x for x in leaves if x.requires_grad]
        found = iter(torch.autograd.grad(made, asked, grad, allow_unused=True))
        return None, None, *(next(found) if x.requires_grad else None for x in leaves)


class _Values(torch.autograd.Function):
    """The values of a map that waited, as a tensor whose gradient goes to that."""

    @staticmethod
    def forward(ctx: Any, waiting: Waiting) -> Tensor:
        assert waiting.full is not None
        return waiting.full.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


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
    """Of a call of `F.interpolate` the map, its new size and `align_corners`, if it is linear upsampling of an exact scale, 1 too; else None."""
    low = given["input"]
    no: tuple[None, tuple[int, ...], bool] = None, (), False
    if given.get("antialias") or not low.is_floating_point():
        return no
    if LINEAR.get(low.ndim) != given.get("mode", "nearest"):
        return no
    new = new_size(given)
    if new is None or any(large < small for large, small in zip(new, low.shape[2:], strict=True)):
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
