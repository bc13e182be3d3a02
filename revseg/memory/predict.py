"""What a training step would take, found without the memory and without a GPU.

The step runs on fake tensors, which have shapes and no values (`revseg.memory.follow`), for sizes that no machine here
could hold, in seconds. A network that exists is taken as it is: fake tensors stand in the places of its own for the time of the
run (`revseg.memory.stand_in`).
"""

from __future__ import annotations

import copy
import gc
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from revseg.losses import UpsampleCrossEntropy
from revseg.memory.follow import Follower
from revseg.memory.prediction import Prediction
from revseg.memory.stand_in import StandIns, reached, standing_in, taught_fake_tensors

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
Loss = Callable[..., Any]
Optimizer = str | torch.optim.Optimizer | Callable[..., torch.optim.Optimizer]
_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)


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
    make_optimizer = _optimizer(optimizer)
    names = {module: name for name, module in model.named_modules()}
    on_cpu = _device_of(model, device) == "cpu"
    with ExitStack() as stack:
        follower = stack.enter_context(_following(names, on_cpu))
        stand_ins = StandIns(follower)
        roots = [model, *(reached(loss)[0] if loss is not None else ())]
        stack.enter_context(standing_in(roots, stand_ins))
        args, kwargs = _arguments(stand_ins.without_values(example))
        target = stand_ins.without_values(target)
        parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
        for kind, tensors in (
            ("parameters", [*model.parameters(), *model.buffers()]),
            ("inputs", tree_leaves((args, kwargs, target))),
        ):
            _call(follower, tensors, kind)
        model.train(train)
        step = None if make_optimizer is None or not train else make_optimizer(parameters, stand_ins)
        if step is not None:
            for p in parameters:
                p.grad = torch.zeros_like(p)
            step.step()
            step.zero_grad()
            _call(follower, tree_leaves([*map(dict, step.state.values())]), "optimizer")
        gc.collect()
        standing = [block for block, _ in follower.alive.values()]
        follower.start()
        with torch.autocast("cpu", autocast) if autocast is not None else nullcontext():
            if train:
                _train(follower, model, args, kwargs, loss, target, parameters)
            else:
                _infer(follower, model, args, kwargs)
        if step is not None:
            follower.phase = "optimizer"
            step.step()
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
    with _following({}, True) as follower, ExitStack() as stack:
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


@contextmanager
def _following(names: dict[nn.Module, str], inside: bool) -> Iterator[Follower]:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.random.fork_rng(devices=[]), taught_fake_tensors():
        follower = Follower(fake, names, inside)
        with fake, follower:
            yield follower


def _call(follower: Follower, tensors: list[Any], kind: str) -> None:
    """Names what stands before the step."""
    for x in tensors:
        if isinstance(x, Tensor):
            follower.block(x).kind = kind


def _train(
    follower: Follower,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Loss | None,
    target: Any,
    parameters: Sequence[nn.Parameter],
) -> None:
    for p in parameters:
        p.register_post_accumulate_grad_hook(lambda p: _call(follower, [p.grad], "gradients"))  # type: ignore[no-untyped-call]
    with torch.enable_grad():
        follower.phase = "forward"
        output = model(*args, **kwargs)
        if loss is None:
            ends = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
            gradients = [torch.empty_like(x) for x in ends]
        else:
            if target is None and _takes_target(loss):
                target = _target(loss, output, args)
                _call(follower, tree_leaves(target), "inputs")
            follower.phase = "loss"
            value = loss(output, target) if target is not None else loss(output)
            ends, gradients = [value], None
            del value
    del output
    for block, _ in follower.alive.values():
        block.kept = block.phase in ("forward", "loss")
    follower.phase = "backward"
    torch.autograd.backward(ends, gradients)


def _infer(follower: Follower, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    follower.phase = "forward"
    with torch.no_grad():
        model(*args, **kwargs)


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, dict):
        return (), example
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


def _takes_target(loss: Loss) -> bool:
    """Whether a loss has two arguments at the least."""
    try:
        parameters = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
    except (TypeError, ValueError):
        return True
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters.values()) > 1


def _target(loss: Loss, output: Any, args: tuple[Any, ...]) -> Tensor:
    """What a loss would compare the output with."""
    first = next(x for x in tree_leaves(output) if isinstance(x, Tensor))
    if isinstance(loss, UpsampleCrossEntropy):
        return torch.zeros(first.shape[0], *args[0].shape[2:], dtype=torch.uint8)
    if isinstance(loss, _OF_CLASSES) or loss in (F.cross_entropy, F.nll_loss):
        return torch.zeros(first.shape[0], *first.shape[2:], dtype=torch.int64)
    return torch.zeros_like(first)


def _optimizer(given: Optimizer | None) -> Callable[[list[Tensor], StandIns], torch.optim.Optimizer] | None:
    """What makes an optimizer of fake parameters."""
    if given is None:
        return None
    if isinstance(given, str):
        if given not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {given!r}; choose one of {', '.join(sorted(OPTIMIZERS))}")
        make: Callable[..., torch.optim.Optimizer] = OPTIMIZERS[given]
        return lambda parameters, stand_ins: make(parameters, lr=1e-3)
    if isinstance(given, torch.optim.Optimizer):
        optimizer = given
        return lambda parameters, stand_ins: _twin(optimizer, stand_ins)
    factory = given
    return lambda parameters, stand_ins: factory(parameters)


def _twin(optimizer: torch.optim.Optimizer, stand_ins: StandIns) -> torch.optim.Optimizer:
    """The same optimizer of fake parameters."""
    twin = copy.copy(optimizer)
    twin.param_groups = [
        {**group, "params": [stand_ins.of(p) for p in group["params"]]} for group in optimizer.param_groups
    ]
    twin.state = defaultdict(dict)
    return twin


def _device_of(model: nn.Module, device: str | torch.device | None) -> str:
    if device is not None:
        return torch.device(device).type
    first = next(iter([*model.parameters(), *model.buffers()]), None)
    return "cpu" if first is None or first.is_meta else first.device.type


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
