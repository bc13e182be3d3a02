"""One use of a module whose activations are computed again: how it runs, and runs again for its gradients.

A `Use` takes any module: it runs again with a graph. A `UseWithoutGraph` takes what gives its gradients itself
(`revseg.engine.function`), as a `Stack` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revseg.engine.drift import Check, Fingerprint, complain, report
from revseg.engine.function import Function
from revseg.engine.gradients import Grads, alias, edge_of, gradients
from revseg.layers.compact import compact
from revseg.layers.structure import Structure, closed_objects, put_together, take_apart
from revseg.replay.call import Call
from revseg.tensors import versions


class _Checked:
    """What both kinds of use share: whether the second run gives what the first gave."""

    def __init__(self, module: nn.Module, check: Check) -> None:
        self.name = f"Recompute({type(module).__name__})"
        self.check = check

    def _note(self, values: Sequence[Tensor]) -> None:
        self.fingerprint = Fingerprint.of(_comparable(values)) if self.check else None

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


class Use(_Checked):
    """One use of a module in a forward pass.

    Args:
        module: The module.
        structure: Of what it is called with.
        check: See `Recompute`.
        compact: The same.
    """

    def __init__(self, module: nn.Module, structure: Structure, check: Check, compact: bool = False) -> None:
        def run(*tensors: Tensor) -> tuple[list[Tensor], Structure]:
            args, kwargs = put_together(tensors, structure)
            return take_apart(module(*args, **kwargs))

        super().__init__(module, check)
        self.compact = compact
        self.call = Call(run, module)
        self.parameters = self.call.parameters

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
        self._note(outputs)
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
        edges = [edge_of(y) for y in ys]
        del ys  # freed before its gradients take room
        grads = gradients(edges, [*leaves, *own], found, self.name, create_graph=again)
        if self.compact and not again:
            for i, x in enumerate(inputs):
                grads[i] = compact(grads[i], x)
        return grads

    def _belongings(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        buffers = [b for module in self.call.modules for b in module._buffers.values() if b is not None]
        return [*inputs, *self.call.parameters, *buffers]


class UseWithoutGraph(_Checked):
    """One use of a module that gives its gradients itself (`revseg.engine.function`), as a `Stack` does."""

    def __init__(self, module: nn.Module, function: Function, check: Check) -> None:
        super().__init__(module, check)
        self.function, self.parameters = function, function.tensors

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        y, _ = self.function.run(inputs[0], None)
        self.structure = take_apart(y)[1]
        self._note([y])
        return (y,)

    def backward(self, inputs: Sequence[Tensor], parameters: Sequence[Tensor], dys: Grads) -> Grads:
        """The gradients of input and parameters; the list of the result's is emptied."""
        dy = dys.pop()
        given = [*inputs, *parameters]
        if dy is None:
            return [None] * len(given)
        if torch.is_grad_enabled():
            given = [alias(x) for x in given]
            value = self.function.rerun_with_graph(given[0], given[1:])
            self._compare([value])
            return gradients([edge_of(value)], given, [dy], self.name, create_graph=True)
        wanted = [x.requires_grad for x in given]
        (value, _), differentiate = self.function.rerun(inputs[0], parameters, None, wanted)
        self._compare([value])
        del value  # freed before its gradients take room
        return [None] * len(given) if differentiate is None else differentiate(dy, [None] * len(given))


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
