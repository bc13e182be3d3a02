"""Ordinary layers, run again in the backward pass.

What cannot be inverted can still be recomputed, from its input: the part of a network that
`Recompute` wraps keeps its inputs and nothing else. In the backward pass it runs a second time,
under the rules that hold for the functions of a `ReversibleSequence` (`revseg.engine.replay.Call`),
so that running statistics count a batch once and dropout masks repeat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing the compiler
from torch.autograd.graph import get_gradient_edge
from torch.fx import Proxy
from torch.nn.parameter import is_lazy

from revseg.engine.drift import Check, Fingerprint, complain, raise_pending, report
from revseg.engine.gradients import Grads, alias, gradients
from revseg.engine.replay import Call
from revseg.engine.tensors import versions
from revseg.engine.tracing import Unscriptable, is_traced
from revseg.layers.structure import Structure, closed_objects, put_together, take_apart


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

    Memory: the inputs; the buffers of the module, and the random state if it draws.

    Numerics: gradients are bitwise those of plain autograd where kernels give the same result
    twice.

    Raises:
        TypeError: If `module` is no module.
        ValueError: If `check` has none of its values.
    """

    any_memory_format = True  # for the engine, which may lay out streams as convolutions want them

    def __init__(self, module: nn.Module, *, save_activations: bool = False, check: Check = "error") -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected a torch.nn.Module, got {type(module).__name__}")
        if check not in ("error", "warn", None):
            raise ValueError(f'expected check to be "error", "warn" or None, got {check!r}')
        self.module = module
        self.save_activations = save_activations
        self.check: Check = check

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
        use = _Use(self.module, structure, self.check)
        outputs = _Recomputed.apply(use, len(tensors), *tensors, *use.call.parameters)  # type: ignore[no-untyped-call]
        return put_together(outputs, use.structure)

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
    def forward(ctx: Any, use: _Use, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
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


class _Entry(torch.autograd.Function):
    """Where gradients enter a graph. They are handed over: whoever sends them by `autograd.grad` holds them to its end."""

    @staticmethod
    def forward(ctx: Any, dys: list[Tensor], *ys: Tensor) -> Tensor:
        ctx.dys = dys
        return torch.zeros((), device=ys[0].device)

    @staticmethod
    def backward(ctx: Any, start: Tensor) -> Any:
        dys, ctx.dys = ctx.dys, None
        return None, *dys


class _Use:
    """One use of a module in a forward pass."""

    def __init__(self, module: nn.Module, structure: Structure, check: Check) -> None:
        def run(*tensors: Tensor) -> tuple[list[Tensor], Structure]:
            args, kwargs = put_together(tensors, structure)
            return take_apart(module(*args, **kwargs))

        self.name = f"Recompute({type(module).__name__})"
        self.check = check
        self.call = Call(run, module)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        before = versions(*inputs)
        (values, self.structure), self.replay = self.call.run(*inputs)
        if versions(*inputs) != before:
            raise RuntimeError(
                f"{self.name}: the module writes to its input, which is then not there to run again with; "
                "make its first in-place operation (inplace=True, add_, ...) an ordinary one"
            )
        for other in closed_objects(self.structure):
            raise TypeError(
                f"{self.name}: expected the module to return tensors, in tuples, lists, dictionaries or dataclasses, "
                f"got a {type(other).__name__}, inside of which tensors would have no gradient; make that known by "
                "torch.utils._pytree.register_pytree_node, or set save_activations=True"
            )
        outputs = _own(values, self._belongings(inputs))
        self.fingerprint = Fingerprint.of(_comparable(outputs)) if self.check else None
        return outputs

    def backward(self, inputs: Sequence[Tensor], parameters: Sequence[Tensor], dys: Grads) -> Grads:
        """The gradients of inputs and parameters; the list of the results' is emptied."""
        again = torch.is_grad_enabled()  # create_graph=True: the gradients will be differentiated
        if again:
            leaves, own = [alias(x) for x in inputs], [alias(p) for p in parameters]
        else:
            with torch.enable_grad():  # aliases, as trackers of modules take leaves for parameters
                leaves = [alias(x.detach().requires_grad_(x.requires_grad)) for x in inputs]
            own = self.call.leaves(parameters)
        with torch.enable_grad():
            values, _ = self.call.rerun(self.replay, *leaves, parameters=own)
        self._compare(values)
        ends = [(y, dy) for y, dy in zip(values, dys, strict=True) if dy is not None and y.requires_grad]
        dys.clear()
        del values
        if not ends:
            return [None] * (len(leaves) + len(own))
        ys, found = map(list, zip(*ends, strict=True))
        del ends
        if not again:
            with torch.enable_grad():
                ys = [_Entry.apply(found, *ys)]  # type: ignore[no-untyped-call]
            found = [torch.ones_like(ys[0])]
        edges = [get_gradient_edge(y) for y in ys]
        del ys  # freed before its gradients take room
        return gradients(edges, [*leaves, *own], found, self.name, create_graph=again)

    def _belongings(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        buffers = [b for module in self.call.modules for b in module._buffers.values() if b is not None]
        return [*inputs, *self.call.parameters, *buffers]

    def _compare(self, values: Sequence[Tensor]) -> None:
        """Complain if the values are not those of the forward pass, or leave it to the next pass."""
        compared = _comparable(values)
        if self.fingerprint is None or not compared:
            return
        finite = torch.stack([kept.isfinite().all() for kept in self.fingerprint.samples])
        off = torch.where(finite, self.fingerprint.distance(compared), 0.0)
        tolerances = [torch.finfo(y.dtype).eps ** 0.5 for y in compared]  # half of the digits

        def judge(distances: list[float]) -> None:
            if all(each <= limit for each, limit in zip(distances, tolerances, strict=True)):  # NaN is not
                return
            complain(
                f"{self.name}: run again on the same input, the module gave other values (off by "
                f"{max(distances):.2g} of their size): it has hidden state, or draws random numbers that are "
                "not torch's; save_activations=True runs it once",
                self.check,
            )

        report(off, judge)


def _followed(*values: Any) -> Iterator[Tensor | Proxy]:
    """What tracers could follow in nested values; looked for only when asked for, as a compiler would follow."""
    tensors, structure = take_apart(values)
    yield from tensors
    yield from (x for x in closed_objects(structure) if isinstance(x, Proxy))


def _own(values: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The values as tensors that share no memory with the others or each other, and are no views."""
    taken = {_memory(x) for x in others}
    own = []
    for y in values:
        own.append(y.clone() if _memory(y) in taken else y.detach())
        taken.add(_memory(own[-1]))
    return tuple(own)


def _memory(x: Tensor) -> int:
    """A number for the memory of a tensor; sparse ones have several pieces and share none."""
    return x.untyped_storage()._cdata if x.layout == torch.strided else id(x)


def _comparable(values: Sequence[Tensor]) -> list[Tensor]:
    return [y for y in values if y.is_floating_point() and y.layout == torch.strided and y.numel()]
