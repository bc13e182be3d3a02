"""Which modules of a network form rows of residual blocks, and why the others do not.

The network runs once on an example, and hooks note how each module was called. What kept the shape of its
input is asked whether it is residual, by a copy whose parameters are zero. A `nn.Sequential` is a row by
itself; the modules of a `nn.ModuleList` are one if the network computes the same with two neighbours joined.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from revseg.layers.stack import Stack
from revseg.layers.structure import take_apart
from revseg.tensors import versions

IsBlock = Callable[[nn.Module], bool] | type[nn.Module] | tuple[type[nn.Module], ...]

ROWS = (nn.Sequential.forward, Stack.forward)  # of modules that call their children in a row

_LISTED = 20  # lines of a report


@dataclass
class Calls:
    """How a module was called: how often, the input it keeps the shape of, or why it can be no block."""

    count: int = 0
    like: tuple[torch.Size, torch.dtype, torch.device] | None = None
    reason: str | None = None


class Search:
    """The rows of blocks in a network; the arguments are those of `revseg.reversible`."""

    def __init__(self, model: nn.Module, example: Any, is_block: IsBlock | None, at_least: int) -> None:
        self.model, self.is_block, self.at_least = model, is_block, at_least
        self.args = example if type(example) is tuple else (example,)
        self.reasons: dict[str, str] = {}  # of each module that might have been a block

    def chains(self) -> list[list[str]]:
        """The names of the blocks of each chain; of the outer chain where blocks hold blocks."""
        probe = copy.deepcopy(self.model).eval()
        devices = {x.device for x in take_apart(self.args)[0] if x.is_cuda}
        with torch.random.fork_rng(devices):
            self.calls = _watched(probe, self.args)
            _make_zero(probe)
            chains: list[list[str]] = []
            for name, row in probe.named_modules():
                if not f"{name}.".startswith(tuple(f"{block}." for chain in chains for block in chain)):
                    chains += self._chains_of(name, row)
        return chains

    def report(self) -> str:
        """What might have been a block and why it was passed over, line by line."""
        lines = []
        names = [name for name, _ in self.model.named_modules(remove_duplicate=False) if name in self.reasons]
        outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
        for reason, group in groupby(outer, self.reasons.__getitem__):
            first, *others = group
            lines.append(f"\n  {first}{f' to {others[-1]}' if others else ''}: {reason}")
        more = len(lines) - _LISTED
        return "".join(lines[:_LISTED]) + (f"\n  and {more} more" if more > 0 else "")

    def _chains_of(self, name: str, row: nn.Module) -> list[list[str]]:
        children = {f"{name}.{key}".lstrip("."): child for key, child in row._modules.items() if child}
        if isinstance(row, nn.ModuleList):
            fitting = [part for run in self._runs(children, None) for part in self._in_a_row(run)]
            short = "a block, but not only the next one reads what it returns"
        elif _calls_in_order(row):
            fitting = self._runs(children, row)
            short = f"a block, but not one of {self.at_least} or more in a row"
        else:
            fitting = [[each] for run in self._runs(children, None) for each in run]
            fitting = [[each] for [each] in fitting if not isinstance(children[each], nn.Sequential)]
            self._pass_over(fitting, "a block, but in no nn.Sequential or nn.ModuleList")
            return []
        self._pass_over([run for run in fitting if len(run) < self.at_least], short)
        return [run for run in fitting if len(run) >= self.at_least]

    def _pass_over(self, runs: list[list[str]], reason: str) -> None:
        self.reasons.update({name: reason for run in runs for name in run})

    def _runs(self, children: dict[str, nn.Module], row: nn.Module | None) -> list[list[str]]:
        """Neighbours that are blocks; of a row that calls its children only those which nobody else calls."""
        fits = {name: self._fits(name, child, row) for name, child in children.items()}
        return [list(run) for fitting, run in groupby(children, fits.__getitem__) if fitting]

    def _fits(self, name: str, module: nn.Module, row: nn.Module | None) -> bool:
        weights = any(p.ndim > 1 for p in module.parameters())
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or not (weights or self.is_block):
            return False
        calls = self.calls[module]
        reason = calls.reason if calls.count else "is not called"
        if reason is None and row is not None:
            count = self.calls[row].count * sum(child is module for child in row._modules.values())
            reason = None if calls.count == count else f"is called {calls.count} times, by its row {count}"
        if reason is None and self.is_block is not None:
            reason = None if self._is_accepted(name) else "is not accepted by is_block"
        elif reason is None and calls.like is not None:
            reason = _why_not_residual(module, *calls.like)
        if reason is not None:
            self.reasons[name] = reason
        return reason is None

    def _is_accepted(self, name: str) -> bool:
        given, is_block = self.model.get_submodule(name), self.is_block
        if isinstance(is_block, (type, tuple)):
            return isinstance(given, is_block)
        return bool(is_block is None or is_block(given))

    def _in_a_row(self, run: list[str]) -> list[list[str]]:
        """The parts of a run that the network calls one after another, each with what the one before returned."""
        if len(run) < 2 or self._computes_the_same_joined(run):
            return [run]
        parts = [run[:1]]
        for pair in pairwise(run):
            if self._computes_the_same_joined(pair):
                parts[-1].append(pair[1])
            else:
                parts.append([pair[1]])
        return parts

    def _computes_the_same_joined(self, names: Sequence[str]) -> bool:
        """Whether the first of these modules may do the work of all, and the others none."""
        network, expected = self._trial
        row: Any = network.get_submodule(names[0].rpartition(".")[0])
        keys = [name.rpartition(".")[2] for name in names]
        blocks = [row.get_submodule(key) for key in keys]
        try:
            for key, module in zip(
                keys, [nn.Sequential(*blocks), *(nn.Identity() for _ in keys[1:])], strict=True
            ):
                setattr(row, key, module)
            return _are_equal(expected, self._values(network))
        except Exception:  # noqa: BLE001 - the network does something else with the modules than to call them
            return False
        finally:
            for key, block in zip(keys, blocks, strict=True):
                setattr(row, key, block)

    @cached_property
    def _trial(self) -> tuple[nn.Module, list[Tensor]]:
        """The network with weights that leave no block without effect, and what it computes."""
        network = copy.deepcopy(self.model).eval()
        for p in network.parameters():
            if p.is_floating_point():
                p.mul_(1 + 0.1 * torch.randn_like(p)).add_(0.01 * torch.randn_like(p))
        return network, self._values(network)

    def _values(self, network: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        return take_apart(network(*self.args))[0]


def _calls_in_order(row: nn.Module) -> bool:
    return type(row).forward in ROWS and "forward" not in vars(row)


def _watched(model: nn.Module, args: tuple[Any, ...]) -> dict[nn.Module, Calls]:
    """How each module is called when the model runs."""
    calls = {module: Calls() for module in model.modules()}
    before: list[list[int]] = []  # versions of the inputs of the calls that are going on

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        before.append(versions(*(x for x in args if isinstance(x, Tensor))))

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        wrote = before.pop() != versions(*(x for x in args if isinstance(x, Tensor)))
        seen = calls[module]
        seen.count += 1
        seen.reason = seen.reason or _why_not_called_as_block(args, kwargs, y, wrote)
        if seen.reason is None:
            seen.like = args[0].shape, args[0].dtype, args[0].device

    hooks = [module.register_forward_pre_hook(enter) for module in calls]
    hooks += [module.register_forward_hook(leave, with_kwargs=True) for module in calls]
    model(*args)
    for hook in hooks:
        hook.remove()
    return calls


def _why_not_called_as_block(
    args: tuple[Any, ...], kwargs: dict[str, Any], y: Any, wrote: bool
) -> str | None:
    if kwargs:
        return f"takes keyword arguments, {', '.join(kwargs)}"
    if len(args) != 1:
        return f"takes {len(args)} arguments"
    x = args[0]
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return f"takes a {type(x).__name__} and returns a {type(y).__name__}, not tensors"
    if wrote:
        return "writes to its input (inplace=True, add_, ...), which must stay as it is"
    if not x.is_floating_point() or (x.shape, x.dtype) != (y.shape, y.dtype):
        return f"makes {list(y.shape)} {y.dtype} of {list(x.shape)} {x.dtype}"
    return None


def _make_zero(model: nn.Module) -> None:
    """Let all parameters be zero, and weights that are made of others, as by weight norm, parameters."""
    for module in [module for module in model.modules() if parametrize.is_parametrized(module)]:
        weights = {name: torch.zeros_like(getattr(module, name)) for name in module.parametrizations}  # type: ignore[union-attr]
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[
            0
        ]  # `remove_parametrizations` would empty that of the model too
        for name, weight in weights.items():
            module.register_parameter(name, nn.Parameter(weight))
    for parameter in model.parameters():
        parameter.zero_()


def _why_not_residual(
    block: nn.Module, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why a block whose parameters are zero is not one that hands on large positive values; None if it is."""
    x = 10 + torch.rand(shape, dtype=dtype, device=device)
    try:
        y = block(x.clone())
    except Exception as error:  # noqa: BLE001 - whatever the block raises is the reason
        return f"does not run by itself: {str(error).splitlines()[0]}"
    fits = isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, x, rtol=1e-3)
    return None if fits else "is not x + F(x): with all parameters zero, it does not hand on its input"


def _are_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether these are the same finite values, at least one."""
    pairs = len(one) == len(other) > 0 and zip(one, other, strict=True)
    return bool(pairs) and all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in pairs or ())
