"""One step of a network on fake tensors: its settings, and how it is run and followed."""

from __future__ import annotations

import copy
import gc
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from revseg.losses import UpsampleCrossEntropy
from revseg.memory.follow import Block, Follower
from revseg.memory.late import Late, arguments
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
Kind = TypeVar("Kind", bound=Follower)


@dataclass(frozen=True, eq=False)  # tensors among its values do not compare
class Step:
    """What a step is; see `revseg.memory.predict`."""

    loss: Loss | None = None
    optimizer: Optimizer | None = None
    train: bool = True
    target: Any = None
    autocast: torch.dtype | None = None
    device: str | torch.device | None = None
    late: bool = False  # whether the loss is by bands where it can be (`revseg.memory.late`)

    def run(
        self,
        model: nn.Module,
        example: Any,
        kind: type[Kind],
        around: Callable[[Kind], AbstractContextManager[Any]] = lambda follower: nullcontext(),
    ) -> tuple[Kind, list[Block]]:
        """Runs the step on fake tensors.

        Args:
            model: Is left as it was.
            example: What it is called with.
            kind: The class of the follower.
            around: A context for the step alone.

        Returns:
            The follower, and the blocks that stood before the step.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
        make_optimizer = _optimizer(self.optimizer) if self.train else None
        names = {module: name for name, module in model.named_modules()}
        on_cpu = _device_of(model, self.device) == "cpu"
        with ExitStack() as stack:
            follower = stack.enter_context(following(names, on_cpu, kind))
            stand_ins = StandIns(follower)
            roots = [model, *(reached(self.loss)[0] if self.loss is not None else ())]
            stack.enter_context(standing_in(roots, stand_ins))
            args, kwargs = arguments(stand_ins.without_values(example))
            target = stand_ins.without_values(self.target)
            parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
            _call(follower, [*model.parameters(), *model.buffers()], "parameters")
            _call(follower, tree_leaves((args, kwargs, target)), "inputs")
            model.train(self.train)
            optimizer = None if make_optimizer is None else make_optimizer(parameters, stand_ins)
            if optimizer is not None:
                for p in parameters:
                    p.grad = torch.zeros_like(p)
                optimizer.step()
                optimizer.zero_grad()
                _call(follower, tree_leaves([*map(dict, optimizer.state.values())]), "optimizer")
            gc.collect()
            standing = [block for block, _ in follower.alive.values()]
            follower.start()
            stack.enter_context(around(follower))
            with torch.autocast("cpu", self.autocast) if self.autocast is not None else nullcontext():
                if self.train:
                    with Late(follower.where) if self.late else nullcontext() as late:
                        ends, gradients, target = _forward(  # the target lives on, as the caller's does
                            follower, model, args, kwargs, self.loss, target, parameters, standing
                        )
                    if late is not None:
                        follower.late, follower.whole_logits = late.used, late.whole
                    _backward(follower, ends, gradients)
                else:
                    _infer(follower, model, args, kwargs)
            if optimizer is not None:
                follower.phase = "optimizer"
                optimizer.step()
        return follower, standing


@contextmanager
def following(names: dict[nn.Module, str], inside: bool, kind: type[Kind]) -> Iterator[Kind]:
    """Fake tensors, and a follower of this kind."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.random.fork_rng(devices=[]), taught_fake_tensors():
        follower = kind(fake, names, inside)
        with fake, follower:
            yield follower


def _call(follower: Follower, tensors: list[Any], kind: str) -> None:
    """Names what stands before the step."""
    for x in tensors:
        if isinstance(x, Tensor):
            follower.block(x).kind = kind


def _forward(
    follower: Follower,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Loss | None,
    target: Any,
    parameters: Sequence[nn.Parameter],
    standing: list[Block],
) -> tuple[list[Tensor], list[Tensor] | None, Any]:
    """Where the backward pass begins, with which gradients, and the target of the loss."""
    for p in parameters:
        p.register_post_accumulate_grad_hook(lambda p: _call(follower, [p.grad], "gradients"))  # type: ignore[no-untyped-call]
    with torch.enable_grad():
        follower.phase = "forward"
        output = model(*args, **kwargs)
        if loss is None:
            ends = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
            return ends, [torch.empty_like(x) for x in ends], None
        if target is None and takes_target(loss):
            count = len(follower.events)
            target = target_for(loss, output, args)
            _call(follower, [target], "inputs")
            del follower.events[count:]  # it stood before
            standing.append(follower.block(target))
        follower.phase = "loss"
        return [loss(output, target) if target is not None else loss(output)], None, target


def _backward(follower: Follower, ends: list[Tensor], gradients: list[Tensor] | None) -> None:
    for block, _ in follower.alive.values():
        block.kept = block.phase in ("forward", "loss")
    follower.phase = "backward"
    torch.autograd.backward(ends, gradients)


def _infer(follower: Follower, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    follower.phase = "forward"
    with torch.no_grad():
        model(*args, **kwargs)


def takes_target(loss: Loss) -> bool:
    """Whether a loss has two arguments at the least."""
    try:
        parameters = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters
    except (TypeError, ValueError):
        return True
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters.values()) > 1


def target_for(loss: Loss, output: Any, args: tuple[Any, ...]) -> Tensor:
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
