"""A loss by bands, and logits whose upsampling waits for it.

Where a network ends in `F.interpolate`, its loss reads maps of all classes at full size, and makes more of them. While
`Late` is on, linear upsampling gives a tensor that has the shape and no values. `F.cross_entropy` takes it as it is, and is
computed by bands from the logits at low resolution (`revseg.losses.UpsampleCrossEntropy`); whatever else looks at it
finds it upsampled as ever. Logits that are there at full size are taken by bands too: then neither their logarithmic softmax
nor its copies exist beside them. So no network has to be known by name, and every result is right.
"""

from __future__ import annotations

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
from revseg.memory.waiting import Waiting, linear_upsampling, materialized, of_interpolate
from revseg.tensors import LINEAR

if TYPE_CHECKING:
    from typing_extensions import Self

_here = threading.local()  # `late`: what is on in this thread
_CROSS_ENTROPY = (
    *("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing"),
)


class Upsampled(Waiting):
    """A map at full size, of which only that at low resolution is there.

    Args:
        low: The map [N, C, h, w].
        size: (H, W).
        align_corners: As in `F.interpolate`.
    """

    low: Tensor
    align_corners: bool
    made_in: Any

    @staticmethod
    def __new__(cls, low: Tensor, size: tuple[int, ...], align_corners: bool) -> Self:
        options = {"size": size, "mode": LINEAR[low.ndim], "align_corners": align_corners}
        made = Waiting.__new__(cls, (*low.shape[:2], *size), low, F.interpolate, (low,), options)
        made.low, made.align_corners, made.made_in = low, align_corners, None
        return made


class Late(TorchFunctionMode):
    """While it is on, linear upsampling waits, and cross-entropy is computed by bands.

    Args:
        where: Says where the program is, when upsampling begins to wait.
    """

    def __init__(self, where: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.where = where
        self.used: list[Any] = []  # where what the losses have taken began to wait
        self.whole = 0  # bytes of the largest logits that they have taken as they are
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
            low, size, align_corners = linear_upsampling(of_interpolate(args, kwargs))
            if low is not None:
                made = Upsampled(materialized(low), size, align_corners)
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
        if target.dtype not in (torch.uint8, torch.int64) or not _are_scores(logits, target):
            return None
        if isinstance(logits, Upsampled) and logits.full is None and logits.follows():
            low, align_corners = logits.low, logits.align_corners
            self.used.append(logits.made_in)
        else:
            low, align_corners = materialized(logits), False
            self.whole = max(self.whole, low.nbytes)
        loss = UpsampleCrossEntropy(
            given.get("ignore_index", -100),
            None,
            given.get("label_smoothing", 0.0),
            given.get("reduction", "mean"),
            align_corners,
        )
        loss.weight = given.get("weight")
        return loss.head_loss(low, target, None)


def _are_scores(logits: Tensor, target: Tensor) -> bool:
    """Whether these are maps of several classes and the class of each of their pixels."""
    sizes = tuple(logits.shape[:1]) + tuple(logits.shape[2:])
    return (
        logits.ndim in LINEAR
        and logits.shape[1] > 1
        and logits.is_floating_point()
        and tuple(target.shape) == sizes
    )


def made_at_the_end(value: Any) -> Any:
    """What a network returns: only what the loss may take by bands still waits."""
    return tree_map_only(Waiting, lambda x: x if isinstance(x, Upsampled) else x.make(), value)


def loss_may_take(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether what a call makes here may be what a loss takes by bands."""
    late: Late | None = getattr(_here, "late", None)
    if func is not F.interpolate or late is None or late.aside:
        return False
    return linear_upsampling(of_interpolate(args, kwargs))[0] is not None


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


class LateLoss:
    """`model.loss(images, labels)`: what `criterion(model(images), labels)` is, where it can be by bands.

    Args:
        model: The network.
        criterion: Takes its output and the labels.

    Memory: where the criterion is a cross-entropy, no map of all classes but the logits, and where the network, or the
        criterion before it, ends in linear upsampling, none at full size.

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
