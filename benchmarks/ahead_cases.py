"""Calls that launch every kernel: what the checks ahead of time compile.

Sizes are those of a small map whose sides divide as those of real ones do. Arguments hold no numbers worth
looking at: nothing of this runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revseg import ops
from revseg.ops import asymmetric_conv, asymmetric_conv_backward

SIZE = (2, 32, 64)  # N, H, W of a map
CLASSES = 19
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Case(NamedTuple):
    """One operation on one kind of map.

    Attributes:
        operation: A key of `operations()`.
        channels: C of the map; of the classes where an operation has scores; 0 for those of the example.
        numbers: A key of `DTYPES`, or "tf32": float32 whose products may be rounded.
        layout: A key of `LAYOUTS`.
    """

    operation: str
    channels: int
    numbers: str
    layout: str = "channels_last"

    def launch(self) -> None:
        """Calls the operation, forward and backward."""
        dtype = DTYPES.get(self.numbers, torch.float32)
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = self.numbers == "tf32"
        try:
            operations()[self.operation](_Maps(self.channels, dtype, LAYOUTS[self.layout]))
        finally:
            torch.backends.cudnn.allow_tf32 = before

    def runs_on(self, target: str) -> bool:
        """Whether a GPU of this kind is ever given the kernels, see `has_asymmetric_conv`."""
        return not (target == "sm_75" and self.operation == "asymmetric_conv")


class _Maps(NamedTuple):
    """Arguments of a kind."""

    channels: int
    dtype: torch.dtype
    layout: torch.memory_format

    def map(self) -> Tensor:
        n, h, w = SIZE
        return torch.zeros(n, self.channels, h, w, dtype=self.dtype).contiguous(memory_format=self.layout)

    def norm(self) -> ops.Norm:
        mean, var = torch.zeros(2, self.channels, dtype=torch.float64)
        weight, bias, slope = torch.zeros(3, self.channels)
        return ops.Norm(mean, var, weight, bias, slope, 1e-3)

    def weight(self, *size: int) -> Tensor:
        return torch.zeros(self.channels, self.channels, *size, dtype=self.dtype)


def _batch_statistics(maps: _Maps) -> None:
    ops.batch_statistics(maps.map())


def _moved_statistics(maps: _Maps) -> None:
    batches, batch = torch.zeros((), dtype=torch.int64), torch.zeros(2, maps.channels, dtype=torch.float64)
    for momentum in (0.1, None):
        ops.move_statistics(*torch.zeros(2, maps.channels, dtype=maps.dtype), batches, *batch, 100, momentum)


def _bn_act(maps: _Maps) -> None:
    ops.bn_act(maps.map(), maps.norm())
    ops.bn_act_add(maps.map(), maps.norm(), maps.map())


def _bn_act_backward(maps: _Maps) -> None:
    u, dz = maps.map(), maps.map()
    ops.bn_act_backward(u, dz, maps.norm(), True)
    ops.bn_act_backward(u, dz, maps.norm(), True, out=dz)
    ops.bn_act_sums(u, dz, maps.norm())


def _asymmetric_conv(maps: _Maps) -> None:
    sums = torch.zeros(3, maps.channels, dtype=torch.float64)
    for weight, norm in ((maps.weight(3, 1), None), (maps.weight(1, 3), maps.norm())):
        asymmetric_conv(maps.map(), norm, weight, 1, True)
        u, dz, x = (maps.map() for _ in range(3))
        asymmetric_conv_backward(u, dz, maps.norm(), sums, True, x, norm, weight, 1)


def _sum_of_pools(maps: _Maps) -> None:
    x = maps.map()
    y = ops.sum_of_pools(x, (3, 5, 7))
    ops.sum_of_pools_backward(y, x, (3, 5, 7))


def _upsample_cross_entropy(maps: _Maps) -> None:
    n, h, w = SIZE
    weight = torch.zeros(maps.channels)
    for labels, options in (
        (torch.zeros(n, 8 * h, 8 * w, dtype=torch.uint8), {}),
        (torch.zeros(n, 8 * h, 8 * w, dtype=torch.int64), {"weight": weight, "label_smoothing": 0.1}),
        (torch.zeros(n, 8 * h, 8 * w, dtype=torch.uint8), {"reduction": "none"}),
    ):
        loss = ops.upsample_cross_entropy(maps.map().requires_grad_(), labels, **options)
        loss.backward(torch.ones_like(loss))


def _upsample_argmax(maps: _Maps) -> None:
    _, h, w = SIZE
    ops.upsample_argmax(maps.map(), (8 * h, 8 * w))


OPERATIONS: dict[str, Callable[[_Maps], Any]] = {
    "batch_statistics": _batch_statistics,
    "moved_statistics": _moved_statistics,
    "bn_act": _bn_act,
    "bn_act_backward": _bn_act_backward,
    "asymmetric_conv": _asymmetric_conv,
    "sum_of_pools": _sum_of_pools,
    "upsample_cross_entropy": _upsample_cross_entropy,
    "upsample_argmax": _upsample_argmax,
}
OF_CLASSES = ("upsample_cross_entropy", "upsample_argmax")
OF_VECTORS = ("moved_statistics",)  # which have no layout
CHANNELS = (8, 16, 32, 64, 128)


def operations() -> dict[str, Callable[[_Maps], Any]]:
    """`OPERATIONS`, and by their examples the kernels that none of these launches."""
    launched = {f"revseg.kernels.{home}.op" for home in (*OPERATIONS, "running_statistics")}
    others = {
        name: partial(_of_example, kernel)
        for name, kernel in ops.KERNELS.items()
        if kernel.function.__module__ not in launched and kernel.has_triton
    }
    return OPERATIONS | others


def _of_example(kernel: ops.Kernel, maps: _Maps) -> None:
    inputs = kernel.example("cpu", maps.dtype)
    kernel.function(*(x.contiguous(memory_format=maps.layout) if _is_map(x) else x for x in inputs))


def _is_map(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4


def _channels(operation: str) -> tuple[int, ...]:
    if operation not in OPERATIONS:
        return (0,)
    return (CLASSES,) if operation in OF_CLASSES else CHANNELS


def all_cases() -> list[Case]:
    """Every operation in every dtype, with every number of channels; the convolution in both precisions too."""
    cases = []
    for operation in operations():
        for channels in _channels(operation):
            for numbers in (*DTYPES, "tf32") if operation == "asymmetric_conv" else DTYPES:
                layouts = ["contiguous"] if operation in OF_VECTORS else LAYOUTS
                cases += [Case(operation, channels, numbers, layout) for layout in layouts]
    return cases
