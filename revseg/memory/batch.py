"""The largest batch that a device takes, found by trying."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from revseg.memory.late import arguments
from revseg.memory.room import is_memory_error
from revseg.memory.step import Loss, takes_target, target_for


def find_batch_size(
    model: nn.Module, example: Any, loss: Loss | None = None, *, target: Any = None, limit: int = 1024
) -> int:
    """The largest batch whose training step runs through on the device of the model.

    Doubles the batch until memory runs out, then bisects. Gradients, buffers and the random state are afterwards as they were. On a CPU the system may end a process that
    takes too much before anything can be caught: there, ask `revseg.memory.predict`.

    Args:
        model: Any network, on its device.
        example: What it is called with, as in `revseg.memory.predict`, one image or more; its first image is repeated.
        loss: As in `revseg.memory.predict`.
        target: What the loss compares with, for as many images; made up by default.
        limit: The largest batch to try.

    Returns:
        The number of images; 0 if not even one fits.

    Raises:
        ValueError: If the limit is below 1.
    """
    if limit < 1:
        raise ValueError(f"expected a limit of 1 or more, got {limit}")
    with _left_as_it_was(model):
        low, high = 0, 1
        while high <= limit and _runs(model, example, loss, target, high):
            low, high = high, 2 * high
        high = min(high, limit + 1)
        while high - low > 1:
            middle = (low + high) // 2
            if _runs(model, example, loss, target, middle):
                low = middle
            else:
                high = middle
    return low


def _runs(model: nn.Module, example: Any, loss: Loss | None, target: Any, images: int) -> bool:
    """Whether a step of so many images runs through."""
    try:
        _step(model, example, loss, target, images)
    except (MemoryError, RuntimeError) as error:
        if is_memory_error(error):
            return False
        raise
    finally:
        model.zero_grad(set_to_none=True)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
    return True


def _step(model: nn.Module, example: Any, loss: Loss | None, target: Any, images: int) -> None:
    def repeated(x: Tensor) -> Tensor:
        return x[:1].expand(images, *x.shape[1:]).contiguous()

    args, kwargs = arguments(tree_map_only(Tensor, repeated, example))
    output = model(*args, **kwargs)
    if loss is None:
        ends = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
        torch.autograd.backward(ends, [torch.zeros_like(x) for x in ends])
        return
    if not takes_target(loss):
        loss(output).backward()
        return
    given = target_for(loss, output, args) if target is None else tree_map_only(Tensor, repeated, target)
    loss(output, given).backward()


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Gradients, buffers and random state are afterwards as they were."""
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    with torch.random.fork_rng():
        try:
            for p, _ in gradients:
                p.grad = None
            yield
        finally:
            for p, gradient in gradients:
                p.grad = gradient
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
