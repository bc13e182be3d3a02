"""What a training step would take, found without the memory and without a GPU.

The step runs on fake tensors, which have shapes and no values. Every operation's results are
followed from the moment they are made until their storage is freed, so the sum at its highest is
the peak, in seconds, for sizes that no machine here could hold.

Two things differ from a real run. Libraries take workspaces of their own inside of an operation,
which nobody outside sees. And while operations are followed autograd no longer adds gradients in
place: where it adds a second gradient to one that nobody else holds, a real run needs no memory for
the sum, and none is counted here.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_HELD_BY_ENGINE = 2  # uses of a gradient's storage: by autograd, and by the arguments of the addition


def predicted_peak_bytes(prepare: Callable[[], Callable[[], object]]) -> int:
    """The most bytes that tensors of a step would take at one time, beyond those before it.

    ```python
    def prepare():
        model = create_model("vnet", memory="lowest")
        def step():
            images = torch.empty(4, 3, 1024, 2048, dtype=torch.uint8)
            labels = torch.zeros(4, 1024, 2048, dtype=torch.uint8)
            UpsampleCrossEntropy()(model(images), labels).backward()
        return step
    ```

    Args:
        prepare: Makes what is there before the step, the network above all, and returns the step.
            Both run on fake tensors, so neither can look at values. Gradients of parameters are
            made before the step is counted.

    Returns:
        The peak in bytes. What `revseg.memory.peak_bytes` measures is higher by the workspaces of
        libraries: a few percent with convolutions on a CPU.

    Memory: none of its own; a table of the storages that are alive.
    """
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        step = prepare()
        gc.collect()
        follower = _Follower()
        with follower:
            step()
    return follower.peak


class _Follower(TorchDispatchMode):
    """Adds up the storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self.alive: dict[int, tuple[int, weakref.ref[Any]]] = {}  # by storage: bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in before:
                self._follow(x.untyped_storage())
        if _is_accumulation(func, args):
            self._free(args[0].untyped_storage()._cdata)  # the sum is in the place of its first summand
        self.peak = max(self.peak, self.now)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes(), weakref.ref(storage, lambda _: self._free(key))
        self.now += storage.nbytes()

    def _free(self, key: int) -> None:
        size, _ = self.alive.pop(key, (0, None))
        self.now -= size


def _is_accumulation(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether autograd adds a gradient to an earlier one that nobody else holds."""
    if func is not torch.ops.aten.add.Tensor or torch._C._current_autograd_node() is None:
        return False
    frame: Any = sys._getframe(2)
    while frame is not None and "_python_dispatch" in frame.f_code.co_filename:
        frame = frame.f_back
    by_engine = frame is not None and frame.f_code.co_name == "_engine_run_backward"
    return by_engine and torch._C._storage_Use_Count(args[0].untyped_storage()._cdata) <= _HELD_BY_ENGINE
