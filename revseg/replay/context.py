"""What surrounds a function and changes its value: random state and autocast.

Both are captured before a first run and restored for the length of a second one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Autocast = dict[str, tuple[bool, torch.dtype]]  # by type of device
RandomState = list[tuple[torch.device, Tensor]]  # of each generator; all of them on the CPU

NO_CHANGE = nullcontext()  # a function of a small network takes little longer than a few contexts


def gpu_is_awake() -> bool:
    """Whether anything has used a GPU yet; before, its generators have no state."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured: nothing may wait, and random state of the GPU cannot be read."""
    return gpu_is_awake() and bool(torch.cuda.is_current_stream_capturing())


def devices_of(tensors: Iterable[Tensor]) -> list[torch.device]:
    """Where a function of these tensors may draw: the CPU, their devices, the current GPU."""
    devices = {torch.device("cpu"): None} | {x.device: None for x in tensors if not x.is_meta}
    if gpu_is_awake():
        devices[torch.device("cuda", torch.cuda.current_device())] = None
    return list(devices)


def autocast_state(devices: Iterable[torch.device]) -> Autocast:
    """Whether autocast is on, and its dtype, for each type of device."""
    return {
        kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in {device.type for device in devices}
        if torch.amp.is_autocast_available(kind)
    }


def autocast_as(state: Autocast) -> AbstractContextManager[Any]:
    """Autocast as `autocast_state` found it, without its cache of cast weights."""
    casts = [
        torch.autocast(kind, dtype, enabled, cache_enabled=False)
        for kind, (enabled, dtype) in state.items()
        if enabled or torch.is_autocast_enabled(kind)
    ]
    return _all_of(casts) if casts else NO_CHANGE


def is_casting(kind: str) -> bool:
    """Whether autocast is on for this type of device."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """No autocast for this type of device."""
    return torch.autocast(kind, enabled=False) if is_casting(kind) else NO_CHANGE


@contextmanager
def _all_of(contexts: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def random_state(devices: Iterable[torch.device]) -> RandomState:
    """The state of the default generator of each device; of the CPU's alone while a CUDA graph is captured."""
    if is_capturing():
        devices = [device for device in devices if device.type == "cpu"]
    return [
        (
            device,
            torch.get_rng_state()
            if device.type == "cpu"
            else torch.get_device_module(device).get_rng_state(device),
        )
        for device in devices
    ]


def random_as(states: RandomState) -> AbstractContextManager[Any]:
    """The generators in these states; afterwards as they were before."""
    return _random_as(states) if states else NO_CHANGE


@contextmanager
def _random_as(states: RandomState) -> Iterator[None]:
    present = random_state(device for device, _ in states)
    _set_random_state(states)
    try:
        yield
    finally:
        _set_random_state(present)


def drawing_refused_in_capture() -> AbstractContextManager[Any]:
    """While a CUDA graph is captured, an error for whatever draws; a second run could not draw the same."""
    return _NoDraws() if is_capturing() else NO_CHANGE  # type: ignore[no-untyped-call]


class _NoDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(
                f"{func} draws random numbers inside of a reversible block while a CUDA graph is captured, "
                "and they could not be drawn again: capture without dropout, or set save_activations=True"
            )
        return func(*args, **(kwargs or {}))


def _set_random_state(states: RandomState) -> None:
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
