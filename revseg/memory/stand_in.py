"""Fake tensors in the places of real ones, for the time of a run.

A network that exists, with its weights, is predicted where it is: parameters, buffers and other tensors of its modules are
taken out, fake ones are put in, and afterwards everything is as it was. Whatever modules noted about themselves
in the meantime goes too. `Module.to` and `copy.deepcopy` are taught fake tensors, which torch's own cannot take.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from revseg.memory.follow import Follower

_CONTAINERS = (list, tuple, dict)


class StandIns:
    """Fake tensors by the real ones that they stand for.

    Args:
        follower: Knows small values.
        device: Where the fake tensors are, None where the real ones are.
    """

    def __init__(self, follower: Follower, device: torch.device | None = None) -> None:
        self.follower, self.device = follower, device
        self.known: dict[int, tuple[Tensor, Tensor]] = {}  # by the real one, which stays alive for its number

    def of(self, x: Tensor, values: bool = True) -> Tensor:
        """The one for this tensor, with its values if it is small; a parameter for a parameter."""
        if isinstance(x, FakeTensor):
            return x
        if id(x) not in self.known:
            self.known[id(x)] = x, self._make(x, values)
        return self.known[id(x)][1]

    def without_values(self, value: Any) -> Any:
        """The value with fake tensors in the places of others."""
        return tree_map_only(Tensor, lambda x: self.of(x, values=False), value)

    def within(self, value: Any) -> Any:
        """The value with fake tensors in lists, tuples and dictionaries."""
        if isinstance(value, Tensor):
            return self.of(value)
        if type(value) in (list, tuple):
            return type(value)(map(self.within, value))
        if type(value) is dict:
            return {key: self.within(each) for key, each in value.items()}
        return value

    def _make(self, x: Tensor, values: bool) -> Tensor:
        device = self.device or ("cpu" if x.is_meta else x.device)
        with self.follower.fake, torch.no_grad():
            if x.layout == torch.strided:
                made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
            else:
                made = self.follower.fake.from_tensor(x.detach())
        if isinstance(x, nn.Parameter):
            made = nn.Parameter(made, requires_grad=x.requires_grad)
        elif x.requires_grad:
            made.requires_grad_()
        if values:
            self.follower.values.set(made, x)
        return made


@contextmanager
def standing_in(roots: Iterable[nn.Module], stand_ins: StandIns) -> Iterator[None]:
    """Fake tensors in all modules of these, which are afterwards as they were."""
    modules = list({id(m): m for root in roots for m in root.modules()}.values())
    states = [(module, dict(module.__dict__), _contents(module)) for module in modules]
    try:
        for module in modules:
            for name, value in list(module.__dict__.items()):
                if name in ("_parameters", "_buffers"):
                    module.__dict__[name] = type(value)(
                        (key, None if x is None else stand_ins.of(x)) for key, x in value.items()
                    )
                elif isinstance(value, Tensor) or (
                    type(value) in _CONTAINERS and not name.startswith("_mod")
                ):
                    replaced = stand_ins.within(value) if _holds_tensors(value) else value
                    module.__dict__[name] = replaced
        yield
    finally:
        for module, attributes, contents in states:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, content in contents:
                if isinstance(container, list):
                    container[:] = content
                else:
                    container.clear()
                    container.update(content)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """What lists, dictionaries and sets of a module hold, its children and parameters among it."""
    return [(v, v.copy()) for v in module.__dict__.values() if isinstance(v, (list, dict, set))]


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    if isinstance(value, Tensor):
        return True
    if type(value) not in _CONTAINERS or not depth:
        return False
    return any(_holds_tensors(x, depth - 1) for x in (value.values() if type(value) is dict else value))


@contextmanager
def taught_fake_tensors() -> Iterator[None]:
    """`Module.to` and its like put new parameters in place of fake ones; fake tensors can be copied."""
    apply: Any = nn.Module._apply
    replaced: dict[int, tuple[Tensor, Tensor]] = {}  # so that tied parameters stay tied

    def apply_to_fakes(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if not any(isinstance(p, FakeTensor) for p in module.parameters()):
            return apply(module, fn, recurse)  # type: ignore[no-any-return]
        for child in module.children() if recurse else ():
            child._apply(fn)  # type: ignore[no-untyped-call]
        for places in (module._parameters, module._buffers):
            for name, x in places.items():
                if x is not None:
                    if id(x) not in replaced:
                        replaced[id(x)] = x, _converted(x, fn)
                    places[name] = replaced[id(x)][1]  # type: ignore[assignment]
        return module

    def copied(x: FakeTensor, memo: dict[int, Any]) -> Tensor:
        if id(x) not in memo:
            with torch.no_grad():
                memo[id(x)] = _like(x, x.detach().clone())
            if x.grad is not None:
                memo[id(x)].grad = copy.deepcopy(x.grad, memo)
        return memo[id(x)]  # type: ignore[no-any-return]

    nn.Module._apply = apply_to_fakes  # type: ignore[method-assign]
    FakeTensor.__deepcopy__ = copied  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]
        del FakeTensor.__deepcopy__


def _converted(x: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        y = fn(x)
        if y is x or (y.dtype, y.device, y.shape, y.stride()) == (x.dtype, x.device, x.shape, x.stride()):
            return x
        made = _like(x, y)
        if x.grad is not None:
            made.grad = fn(x.grad)
    return made


def _like(x: Tensor, y: Tensor) -> Tensor:
    """Y as a parameter, if x is one, and with a gradient, if x has one."""
    if isinstance(x, nn.Parameter):
        return nn.Parameter(y, requires_grad=x.requires_grad)
    return y.requires_grad_() if x.requires_grad and x.is_leaf else y


def reached(fn: Any, depth: int = 6) -> tuple[list[nn.Module], list[Tensor]]:
    """Modules and tensors that a function uses: in its closure, arguments, object, and what it names."""
    modules: list[nn.Module] = []
    tensors: list[Tensor] = []
    seen: dict[int, Any] = {}  # the values too, so that no other gets the number of one

    def visit(value: Any, depth: int) -> None:
        if id(value) in seen or depth < 0:
            return
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            modules.append(value)
        elif isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, torch.optim.Optimizer):
            visit([group["params"] for group in value.param_groups], depth)
        elif isinstance(value, (list, tuple, set)):
            for each in value:
                visit(each, depth - 1)
        elif isinstance(value, dict):
            visit(list(value.values()), depth)
        elif isinstance(value, functools.partial):
            visit([value.func, value.args, value.keywords], depth)
        elif isinstance(value, types.MethodType):
            visit([value.__self__, value.__func__], depth)
        elif isinstance(value, types.FunctionType):
            if value.__module__ is not None and value.__module__.partition(".")[0] in ("torch", "revseg"):
                return
            visit([value.__defaults__, value.__kwdefaults__], depth)
            visit([_content(cell) for cell in value.__closure__ or ()], depth)
            visit([value.__globals__[n] for n in _names(value.__code__) if n in value.__globals__], depth)

    visit(fn, depth)
    return modules, tensors


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None  # not filled yet


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
