"""Tensors that a function puts aside as attributes of its modules, like the balance loss of a gate.

The first run of a function has no graph, so a loss on such a tensor would lack its gradient without a word. From that
run to the second, while the caller builds the loss, these tensors require grad, and a backward pass that reaches one
of them raises. Reading their values costs nothing and means what it means under plain autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_OF_TORCH = frozenset(vars(nn.Module()))
Slot = tuple[Any, Any, Tensor, str]  # a container, where in it, the tensor, and its name for messages


@contextmanager
def marking(modules: Sequence[nn.Module]) -> Iterator[None]:
    """A first run: whoever asks for gradients of what it puts aside hears why there are none.

    Args:
        modules: Those that the function uses.
    """
    before = {id(tensor) for _, _, tensor, _ in _slots(modules) if not _is_marked(tensor)}
    if torch.is_grad_enabled():
        unmark(modules)  # for a graph that is kept they are ordinary tensors
    yield
    for container, key, tensor, name in list(_slots(modules)):
        differentiable = tensor.is_floating_point() or tensor.is_complex()
        if (
            id(tensor) in before
            or not differentiable
            or isinstance(tensor, nn.Parameter)
            or _is_marked(tensor)
        ):
            continue
        with torch.enable_grad():
            anchor = torch.empty(0, requires_grad=True)
            container[key] = _Unreachable.apply(tensor.detach(), anchor, name)  # type: ignore[no-untyped-call]


def unmark(modules: Sequence[nn.Module]) -> None:
    """For a second run, when the loss is built: what stands there is an ordinary tensor again."""
    for container, key, tensor, _ in list(_slots(modules)):
        if _is_marked(tensor):
            container[key] = tensor.detach()


def _slots(modules: Sequence[nn.Module]) -> Iterator[Slot]:
    """The tensors among the attributes of modules, and in the lists and dictionaries among them."""
    for module in modules:
        attributes = vars(module)
        for name, value in attributes.items():
            if name in _OF_TORCH:  # most of them, and none is a tensor
                continue
            if isinstance(value, Tensor):
                yield attributes, name, value, f"{type(module).__name__}.{name}"
            elif type(value) in (list, dict):
                for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                    if isinstance(each, Tensor):
                        yield value, key, each, f"{type(module).__name__}.{name}[{key!r}]"


def _is_marked(tensor: Tensor) -> bool:
    return tensor.grad_fn is not None and tensor.grad_fn.name() == f"{_Unreachable.__name__}Backward"


class _Unreachable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor, name: str) -> Tensor:
        ctx.attribute = name
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.attribute} was put aside by a function that runs again in the backward pass, so a loss on it has no "
            "gradients: return it as an output (of a Recompute), compute it outside of the function, or set "
            f"save_activations=True; as a constant of the loss use {ctx.attribute}.detach()"
        )
