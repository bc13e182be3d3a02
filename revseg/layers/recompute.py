"""Ordinary layers, run again in the backward pass.

What cannot be inverted can still be recomputed, from its input: the part of a network that
`Recompute` wraps keeps its inputs and nothing else. In the backward pass it runs a second time,
under the rules that hold for the functions of a `ReversibleSequence` (`revseg.replay.call.Call`),
so that running statistics count a batch once and dropout masks repeat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing the compiler
from torch.fx import Proxy
from torch.nn.parameter import is_lazy

from revseg.engine.drift import Check, raise_pending
from revseg.engine.function import Function
from revseg.engine.gradients import Grads
from revseg.engine.tracing import Unscriptable, has_hooks, is_traced
from revseg.layers.recompute_use import Use, UseWithoutGraph
from revseg.layers.structure import closed_objects, put_together, take_apart


class Recompute(Unscriptable, nn.Module):
    """A module whose activations are computed again in the backward pass instead of stored.

    ```python
    stem = Recompute(nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU()))
    y = stem(x)   # keeps x
    ```

    The call is that of the module: any arguments, tensors or not, also inside tuples, lists,
    dictionaries, dataclasses and whatever else torch's pytree knows; the same for what it returns. The state dict is that of the module, without a
    prefix, so checkpoints fit with the wrapper and without it.

    Args:
        module: Ordinary layers, or any network.
        save_activations: True for the plain twin: ordinary autograd, the same numbers.
        check: What to do when the second run gives other values: "error", "warn", or None to
            skip the comparison.
        compact: Whether gradients of inputs that are views of larger ones are copied, so that these go: it pays where an input
            of the module is joined to others in it, and is read by others too. The numbers are the same.

    Memory: the inputs; the buffers of the module, and the random state if it draws.

    Numerics: gradients are bitwise those of plain autograd where kernels give the same result
    twice.

    Raises:
        TypeError: If `module` is no module.
        ValueError: If `check` has none of its values.
    """

    any_memory_format = True  # for the engine, which may lay out streams as convolutions want them

    def __init__(
        self,
        module: nn.Module,
        *,
        save_activations: bool = False,
        check: Check = "error",
        compact: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
        if check not in ("error", "warn", None):
            raise ValueError(f'expected check to be "error", "warn" or None, got {check!r}')
        self.module = module
        self.save_activations = save_activations
        self.check: Check = check
        self.compact = compact

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns; tensors that share memory with inputs or each other as copies.

        Raises:
            RuntimeError: If the module writes to an input: it would be gone in the second run.
            TypeError: If it returns an object of another kind: tensors inside would have no gradient.
        """
        if self.save_activations or not torch.is_grad_enabled() or is_traced(_followed(args, kwargs)):
            return self.module(*args, **kwargs)
        return self._run(*args, **kwargs)

    @_disable_dynamo
    def _run(self, *args: Any, **kwargs: Any) -> Any:
        raise_pending()
        tensors, structure = take_apart((args, kwargs))
        if not self._needs_gradient(tensors):
            return self.module(*args, **kwargs)
        use = self._use(args, kwargs) or Use(self.module, structure, self.check, self.compact)
        outputs = _Recomputed.apply(use, len(tensors), *tensors, *use.parameters)  # type: ignore[no-untyped-call]
        return put_together(outputs, use.structure)

    def _use(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> UseWithoutGraph | None:
        """A use of a module that gives its gradients itself; None if it does not."""
        offer = getattr(self.module, "as_function", None)
        if (
            offer is None
            or kwargs
            or len(args) != 1
            or not isinstance(args[0], Tensor)
            or has_hooks(self.module)
        ):
            return None
        function: Function | None = offer(args[0])
        return None if function is None else UseWithoutGraph(self.module, function, self.check)

    def _needs_gradient(self, tensors: Sequence[Tensor]) -> bool:
        parameters = list(self.parameters())
        if any(is_lazy(p) for p in parameters):
            return False  # they take shape in this run, an ordinary one
        return any(x.requires_grad for x in (*tensors, *parameters))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the module."""
        return self.module.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = [name[len(prefix) :] for name in state_dict if name.startswith(prefix)]
        if not self._are_own(names):
            found = {name: state_dict.pop(prefix + name) for name in names}
            state_dict.update({f"{prefix}module.{name}": value for name, value in found.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _are_own(self, names: Sequence[str]) -> bool:
        """Whether these are names by `named_parameters()`, which begin with "module.", and not those of a state dict."""
        known = {*self.module.state_dict()}
        known |= {
            name
            for named in (self.module.named_parameters(), self.module.named_buffers())
            for name, _ in named
        }
        inner = [name.removeprefix("module.") for name in names if name.startswith("module.")]
        return len(known.intersection(inner)) > len(known.intersection(names))

    def extra_repr(self) -> str:
        return f"save_activations={self.save_activations}, check={self.check!r}"


class _Recomputed(torch.autograd.Function):
    boxed_grads_call = True  # where torch knows it, the incoming gradients are freed after their first use

    @staticmethod
    def forward(ctx: Any, use: Use | UseWithoutGraph, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = use.forward(tensors[:count])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.use, ctx.count = use, count
        return outputs

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, *box: Any) -> Any:
        raise_pending()
        dys: Grads = box[0] if isinstance(box[0], list) else list(box)
        saved = ctx.saved_tensors
        return None, None, *ctx.use.backward(saved[: ctx.count], saved[ctx.count :], dys)


def _followed(*values: Any) -> Iterator[Tensor | Proxy]:
    """What tracers could follow in nested values; looked for only when asked for, as a compiler would follow."""
    tensors, structure = take_apart(values)
    yield from tensors
    yield from (x for x in closed_objects(structure) if isinstance(x, Proxy))
