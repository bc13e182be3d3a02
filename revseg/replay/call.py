"""Run a function again as it ran.

The backward pass of a reversible network runs each function a second time. What the function
gave depended on more than its input: on random numbers, autocast, training flags, its buffers.
`Call.run` notes these, `Call.rerun` puts them back for the length of one run and then restores
what it found, also when an exception passes through. So dropout masks repeat, running statistics
count a batch once, spectral norm iterates once, and the caller's random state stays where it was.

Random state, buffers and parameters of a
module belong to the whole process, so threads take turns: one function runs at a time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes

from revseg.replay.aside import marking, unmark
from revseg.replay.buffers import buffers_of, copies_of, refuse_gradients, share_unchanged, swapped_buffers
from revseg.replay.context import (
    NO_CHANGE,
    Autocast,
    RandomState,
    autocast_as,
    autocast_state,
    devices_of,
    drawing_refused_in_capture,
    gpu_is_awake,
    random_as,
    random_state,
)
from revseg.replay.memo import noting, reminding
from revseg.replay.reach import modules_of

_PATIENCE = 600.0  # seconds to wait for another thread's function

_lock = threading.RLock()
_thread = threading.local()


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()  # a forked process has no thread that could release the old one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def is_recomputing() -> bool:
    """True while a function runs for the second time, in the backward pass.

    For hooks and modules that count, log or draw: what they do in that run has been done before.
    """
    return getattr(_thread, "depth", 0) > 0


@dataclass(frozen=True)
class Replay:
    """What one run of a function depended on, besides its inputs and parameters."""

    training: list[bool]
    buffers: list[dict[str, Tensor | None]]  # as they were before the run
    autocast: Autocast
    random: RandomState  # empty when nothing was drawn
    remembered: list[Any]  # results that `revseg.replay.memo` hands to the second run


class Call:
    """One use of a function in a forward pass, to be repeated in the backward pass.

    Args:
        fn: A module, or any callable; the modules that it uses are looked for (`revseg.replay.reach`).
        module: The module whose parameters, buffers and flags `fn` uses, if that is not `fn`.
        modules: Or the modules, without those in them.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        module: nn.Module | None = None,
        modules: tuple[nn.Module, ...] | None = None,
    ) -> None:
        self.fn = fn
        root = fn if module is None else module
        with Turn():
            self._collect(modules_of(root) if modules is None else modules)

    def _collect(self, modules: tuple[nn.Module, ...]) -> None:
        self.modules = modules
        self.parameters: list[Tensor] = []  # each once
        self._slots: list[tuple[dict[str, Any], str, int]] = []  # where each parameter stands
        indices: dict[int, int] = {}
        for module in modules:
            owner = module._parameters
            for name, parameter in owner.items():
                if parameter is not None:
                    index = indices.setdefault(id(parameter), len(indices))
                    self._slots.append((owner, name, index))
                    if index == len(self.parameters):
                        self.parameters.append(parameter)

    def run(self, *inputs: Any, parameters: Sequence[Tensor] | None = None) -> tuple[Any, Replay]:
        """The value of the function, and what a second run needs.

        Autocast's cache of cast weights is off: filled here without gradients, it would cut
        every later use of the same weights off from them.
        """
        if parametrize._cache_enabled and any(map(parametrize.is_parametrized, self.modules)):
            raise RuntimeError(
                "torch.nn.utils.parametrize.cached() keeps weights made here without gradients; "
                "leave it, or set save_activations=True"
            )
        devices = devices_of((*(x for x in inputs if isinstance(x, Tensor)), *self.parameters))
        autocast = autocast_state(devices)
        awake = gpu_is_awake()
        with Turn():
            before = random_state(devices)
            training = [module.training for module in self.modules]
            refuse_gradients(self.modules)
            present = buffers_of(self.modules)
            buffers = copies_of(present)
            with (
                autocast_as(autocast),
                _without_fast_path(),
                NO_CHANGE if parameters is None else self.swapped(parameters),
                drawing_refused_in_capture(),
                marking(self.modules),
                noting() as remembered,
            ):
                value = self.fn(*inputs)
            share_unchanged(buffers, present)
            after = random_state(devices)
        if gpu_is_awake() != awake:
            raise RuntimeError(
                "the function is the first to use the GPU, whose random state before that is unknown; "
                "call torch.cuda.init() before"
            )
        with _disable_current_modes():  # the states are real where a mode makes tensors fake
            drawn = not all(torch.equal(a, b) for (_, a), (_, b) in zip(before, after, strict=True))
        return value, Replay(training, buffers, autocast, before if drawn else [], remembered)

    def rerun(self, replay: Replay, *inputs: Any, parameters: Sequence[Tensor]) -> Any:
        """The value of the function once more, with the given parameters in place of its own."""
        _thread.depth = getattr(_thread, "depth", 0) + 1
        try:
            with (
                Turn(),
                _without_cached_weights(),
                _without_fast_path(),
                self.swapped(parameters),
                self._as_it_was(replay),
                autocast_as(replay.autocast),
                random_as(replay.random),
                reminding(replay.remembered),
            ):
                unmark(self.modules)
                return self.fn(*inputs)
        finally:
            _thread.depth -= 1

    def leaves(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Tensors to differentiate by, each standing for one parameter.

        A parameter stands for itself unless `torch.autograd.grad` would then fire its hooks,
        which the caller's own backward pass fires again, or run on into its history.
        """
        with Turn():
            present = {id(owner[name]) for owner, name, _ in self._slots}
        return [
            p
            if id(p) in present and p.is_leaf and not p._backward_hooks
            else p.detach().requires_grad_(p.requires_grad)
            for p in parameters
        ]

    def swapped(self, parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """Other tensors in the places of the parameters; for one thread at a time."""
        swaps = [
            (owner, name, owner[name], parameters[index])
            for owner, name, index in self._slots
            if owner[name] is not parameters[index]
        ]
        return _swap(swaps) if swaps else NO_CHANGE

    @contextmanager
    def _as_it_was(self, replay: Replay) -> Iterator[None]:
        present = [module.training for module in self.modules]
        try:
            _set_training(self.modules, replay.training)
            with swapped_buffers(self.modules, replay.buffers):
                yield
        finally:
            _set_training(self.modules, present)


def _set_training(modules: Sequence[nn.Module], flags: Sequence[bool]) -> None:
    for module, training in zip(modules, flags, strict=True):
        if module.training != training:
            module.training = training


@contextmanager
def _swap(swaps: Sequence[tuple[dict[str, Any], str, Tensor, Tensor]]) -> Iterator[None]:
    """Other parameters in the places of these: an owner, a name, the present one and the one for now."""
    try:
        for owner, name, _, parameter in swaps:
            owner[name] = parameter
        yield
    finally:
        for owner, name, present, _ in swaps:
            owner[name] = present


class Turn:
    """Wait until no other thread is inside a function."""

    def __enter__(self) -> None:
        self.lock = _lock
        if not self.lock.acquire(timeout=_PATIENCE):
            raise RuntimeError(
                f"waited {_PATIENCE:.0f} s for another thread's function: does a function wait for a thread "
                "that runs a reversible sequence?"
            )

    def __exit__(self, *error: object) -> None:
        self.lock.release()


def _without_cached_weights() -> AbstractContextManager[Any]:
    """Leave a surrounding `parametrize.cached()`: its weights have graphs that are used up by now."""
    return _leaving_cache() if parametrize._cache_enabled else NO_CHANGE


@contextmanager
def _leaving_cache() -> Iterator[None]:
    depth = parametrize._cache_enabled
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        parametrize._cache_enabled = depth


def _without_fast_path() -> AbstractContextManager[Any]:
    """No attention that is for inference alone: it rounds otherwise, and leaves out what a mask covers.

    The first run is without gradients, and plain autograd's is not.
    """
    return _SlowPath() if torch.backends.mha.get_fastpath_enabled() else NO_CHANGE


class _SlowPath:
    def __enter__(self) -> None:
        torch.backends.mha.set_fastpath_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch.backends.mha.set_fastpath_enabled(True)
