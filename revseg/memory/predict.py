"""What a training step would take, found without the memory and without a GPU.

The step runs on fake tensors, which have shapes and no values (`revseg.memory.follow`), for sizes that no machine here
could hold, in seconds. A network that exists is taken as it is: fake tensors stand in the places of its own for the time of the
run (`revseg.memory.stand_in`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from revseg.memory.follow import Follower
from revseg.memory.prediction import Prediction
from revseg.memory.stand_in import StandIns, reached, standing_in
from revseg.memory.step import Loss, Optimizer, Step, following


def predict(
    model: nn.Module,
    example: Any,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
    train: bool = True,
    *,
    target: Any = None,
    autocast: torch.dtype | None = None,
    device: str | torch.device | None = None,
    by_bands: bool = False,
) -> Prediction:
    """What one step of a network takes of memory, in seconds and without that memory.

    ```python
    prediction = predict(model, torch.empty(4, 3, 1024, 2048, device="meta"), nn.CrossEntropyLoss(), "adam")
    print(prediction)         # the table
    prediction.peak           # bytes, parameters and the optimizer's state included
    ```

    Args:
        model: Any network, real or on the meta device. It is left as it was.
        example: What the network is called with: a tensor, a tuple of arguments, a dictionary of keyword arguments.
            Tensors on the meta device take no memory.
        loss: Called as `loss(output, target)`; or as `loss(output)` if it takes one argument. Without one, a
            gradient of the output's size comes from outside.
        optimizer: "adam", "adamw", "rmsprop" or "sgd"; or an optimizer of this model; or a class or function that makes one of
            parameters. It has run before, so its state stands. None for no step of an optimizer.
        train: False for inference, in evaluation mode and without gradients.
        target: What the loss compares with. By default labels for a cross-entropy, else a tensor like the output.
        autocast: The dtype to which autocast casts; None for none.
        device: Where the step will run, "cpu" or "cuda"; by default where the model is. On a CPU the copies that
            convolutions make inside count, on a GPU they are those of cuDNN, which nobody knows beforehand.
        by_bands: Whether the loss is that of `revseg.memory.late.LateLoss`, as the `loss` of a fitted network is.

    Returns:
        The peak, and who stands there.

    Raises:
        UnpredictableError: If the step depends on values: `.item()`, `if isnan(...)`, masks that select. The error
            names the line.
        TypeError: If the model is none.
        ValueError: If the optimizer's name is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    step = Step(loss, optimizer, train, target, autocast, device, by_bands)
    follower, standing = step.run(model, example, Follower)
    return Prediction.of(model, standing, follower)


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
            Both run on fake tensors; if that fails, as `prepare` looks at values, it runs again on real ones.
            Gradients of parameters are made before the step is counted. Networks that exist can be used, and
            are left as they were.

    Returns:
        The peak in bytes, as `revseg.memory.peak_bytes` measures it.

    Raises:
        UnpredictableError: If the step depends on values.

    Memory: none of its own; a table of the storages that are alive.
    """
    modules, tensors = reached(prepare)
    before = [(x, x.grad) for x in tensors if x.is_leaf]
    with following({}, True, Follower) as follower, ExitStack() as stack:
        stand_ins = StandIns(follower)
        stack.enter_context(standing_in(modules, stand_ins))
        try:
            step = _prepared(prepare)
            stack.enter_context(standing_in(_real(reached(step)[0]), stand_ins))
            for p in _parameters_of(follower.fake):
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            gc.collect()
            follower.start()
            step()
        finally:
            for x, grad in before:
                x.grad = grad
    return follower.peak()


def _prepared(prepare: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """The step, prepared on fake tensors; on real ones if it looks at values, as `revseg.reversible` does."""
    try:
        return prepare()
    except Exception:  # noqa: BLE001 - whatever fails on fake tensors may work on real ones
        with _disable_current_modes():
            return prepare()


def _real(modules: list[nn.Module]) -> list[nn.Module]:
    """Those with tensors that are not fake."""
    return [m for m in modules if not all(isinstance(x, FakeTensor) for x in (*m.parameters(), *m.buffers()))]


def _parameters_of(fake: FakeTensorMode) -> list[Tensor]:
    """All parameters that a mode has made and that are alive."""
    return [
        x
        for x in gc.get_objects()
        if type(x) is FakeTensor and x.fake_mode is fake and isinstance(x, nn.Parameter) and x.requires_grad
    ]
