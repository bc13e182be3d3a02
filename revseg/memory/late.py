"""Logits whose upsampling waits for the loss.

Where a network ends in `F.interpolate`, its loss reads maps of all classes at full size, and makes more of them. While
`Late` is on, linear upsampling gives a tensor that has the shape and no values. `F.cross_entropy` takes it as it is, and is
computed by bands from the logits at low resolution (`revseg.losses.UpsampleCrossEntropy`); whatever else looks at it
finds it upsampled as ever. So no network has to be known by name, and every result is right.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from revseg.losses import UpsampleCrossEntropy

if TYPE_CHECKING:
    from typing_extensions import Self

_here = threading.local()  # `late`: what is on in this thread
_MODES = {3: "linear", 4: "bilinear", 5: "trilinear"}  # by dimensions of the map
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
_CROSS_ENTROPY = (
    *("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing"),
)


class Upsampled(Tensor):
    """A map at full size, of which only that at low resolution is there.

    Args:
        low: The map [N, C, h, w].
        size: (H, W).
        align_corners: As in `F.interpolate`.
    """

    low: Tensor
    align_corners: bool
    full: Tensor | None
    made_in: Any

    @staticmethod
    def __new__(cls, low: Tensor, size: tuple[int, ...], align_corners: bool) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls, (*low.shape[:2], *size), dtype=low.dtype, device=low.device, requires_grad=low.requires_grad
        )
        made.low, made.align_corners, made.full, made.made_in = low, align_corners, None, None
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
        raise RuntimeError(f"{func} does not go through Python, where an upsampled map would be made for it")

    def upsample(self) -> Tensor:
        """The map at full size, made once."""
        if self.full is None:
            with torch._C.DisableTorchFunction():
                self.full = F.interpolate(self.low, **self.options)
        return self.full

    @property
    def options(self) -> dict[str, Any]:
        """What `F.interpolate` is told beside the map."""
        return {
            "size": tuple(self.shape[2:]),
            "mode": _MODES[self.low.ndim],
            "align_corners": self.align_corners,
        }


def materialized(value: Any) -> Any:
    """The value with maps at full size in the places of those that wait."""
    return tree_map_only(Upsampled, lambda x: x.upsample(), value)


class Late(TorchFunctionMode):
    """While it is on, linear upsampling waits, and cross-entropy is computed by bands.

    Args:
        where: Says where the program is, when upsampling begins to wait.
    """

    def __init__(self, where: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.where = where
        self.used: list[Any] = []  # where what the losses have taken began to wait
        self.aside = 0  # how often it was set aside and not yet taken up again

    def __enter__(self) -> Self:
        _here.late = self
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: object) -> None:
        _here.late = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.aside:
            return func(*args, **kwargs)
        if func is F.interpolate:
            low, size, align_corners = _waits(dict(zip(_INTERPOLATE, args, strict=False)) | kwargs)
            if low is not None:
                made = Upsampled(low, size, align_corners)
                made.made_in = self.where()
                return made
        if func is F.cross_entropy:
            loss = self._loss(dict(zip(_CROSS_ENTROPY, args, strict=False)) | kwargs)
            if loss is not None:
                return loss
        return func(*args, **kwargs)

    def _loss(self, given: dict[str, Any]) -> Tensor | None:
        """The loss by bands; None where that cannot be."""
        logits, target = given["input"], given["target"]
        if given.get("size_average") is not None or given.get("reduce") is not None:
            return None
        if not isinstance(logits, Upsampled) or target.is_floating_point() or logits.shape[1] < 2:
            return None
        if target.dtype not in (torch.uint8, torch.int64) or logits.full is not None:
            return None
        loss = UpsampleCrossEntropy(
            given.get("ignore_index", -100),
            None,
            given.get("label_smoothing", 0.0),
            given.get("reduction", "mean"),
            logits.align_corners,
        )
        loss.weight = given.get("weight")
        self.used.append(logits.made_in)
        return loss.head_loss(logits.low, target, None)


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Inside, upsampling is done at once."""
    late: Late | None = getattr(_here, "late", None)
    if late is None:
        yield
        return
    late.aside += 1
    try:
        yield
    finally:
        late.aside -= 1


def _waits(given: dict[str, Any]) -> tuple[Tensor | None, tuple[int, ...], bool]:
    """The map, its size and align_corners if this upsampling can wait; else None."""
    low = given["input"]
    no: tuple[None, tuple[int, ...], bool] = None, (), False
    if given.get("antialias") or not low.is_floating_point():
        return no
    low = materialized(low)
    if _MODES.get(low.ndim) != given.get("mode", "nearest"):
        return no
    size, scale, old = given.get("size"), given.get("scale_factor"), tuple(low.shape[2:])
    if size is None:
        scales = tuple(scale) if isinstance(scale, (tuple, list)) else (scale,) * len(old)
        exact = [n * s for n, s in zip(old, scales, strict=True)]
        if any(x != math.floor(x) for x in exact):
            return no  # the scale that was asked for is not that of the sizes
        size = exact
    new = tuple(int(n) for n in (size if isinstance(size, (tuple, list)) else (size,) * len(old)))
    if math.prod(new) <= math.prod(old):
        return no
    return low, new, bool(given.get("align_corners"))


class LateLoss:
    """`model.loss(images, labels)`: what `criterion(model(images), labels)` is, where it can be by bands.

    Args:
        model: The network.
        criterion: Takes its output and the labels.

    Memory: where the network ends in linear upsampling and the criterion is a cross-entropy, no map at full size.

    Numerics: the loss and its gradients differ by rounding from those of maps at full size, and are nearer to float64:
        sums are float64. A mean over no pixel is 0, not NaN.
    """

    def __init__(self, model: nn.Module, criterion: Callable[..., Any]) -> None:
        self.model, self.criterion = model, criterion

    def __call__(self, images: Any, *labels: Any) -> Any:
        """The loss.

        Args:
            images: What the network is called with: a tensor, a tuple of arguments, a dictionary of keyword arguments.
            labels: What the criterion takes beside the output.
        """
        args, kwargs = arguments(images)
        with Late():
            return self.criterion(self.model(*args, **kwargs), *labels)


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a network's call."""
    if isinstance(example, dict):
        return (), example
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}
