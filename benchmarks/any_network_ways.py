"""The ways to train a network that somebody brings: as it is, by PyTorch's own means and the rivals', and fitted.

A way takes the network, its images and its criterion, and gives the loss of images and labels. Blocks are what stands in
the rows and lists of a network (`benchmarks.network_ways.blocks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from benchmarks.compiling import compiling
from benchmarks.network_ways import NotAllowedError, blocks
from revseg.memory import Plan
from revseg.memory.fit import Search
from revseg.memory.step import Step

Loss = Callable[[Tensor, Tensor], Tensor]
CRITERION = nn.CrossEntropyLoss(ignore_index=255)
TIME = 1.35  # of plain's, that the goal allows
ANY_TIME = 10.0


def plain(model: nn.Module, images: Tensor) -> Loss:
    """As it is."""
    return lambda images, labels: CRITERION(model(images), labels)


def checkpointed(model: nn.Module, images: Tensor) -> Loss:
    """`torch.utils.checkpoint` of every block."""
    return _wrapped(model, lambda i, call: lambda *args: checkpoint(call, *args, use_reentrant=False))


def checkpointed_by_root(model: nn.Module, images: Tensor) -> Loss:
    """`checkpoint_sequential` of every row of blocks, in about as many segments as each has blocks."""
    rows = [m for m in model.modules() if type(m) is nn.Sequential and len(m) > 2 and not _is_layer(m)]
    if not rows:
        raise NotAllowedError("no rows of blocks")
    for row in rows:
        row.forward = _in_segments(list(row))  # type: ignore[method-assign]
    return plain(model, images)


def torch_remat(model: nn.Module, images: Tensor) -> Loss:
    """A region of torch-remat for every block, in which nothing is saved."""
    import torch_remat as package  # type: ignore[import-not-found]

    return _wrapped(model, lambda i, call: package.checkpoint(region_name=f"block {i}")(call))


def compiled(model: nn.Module, budget: float) -> Loss:
    """torch.compile of network and loss, with its activation memory budget."""
    step = torch.compile(plain(model, torch.empty(0)), dynamic=False)

    def run(images: Tensor, labels: Tensor) -> Tensor:
        with compiling(budget):
            return step(images, labels)  # type: ignore[no-any-return]

    return run


def search_of(
    model: nn.Module, images: Tensor, device: str | None = None, bands: bool | None = None
) -> Search:
    """The search for its plans."""
    return Search(model, images, Step(CRITERION, device=device), bands)


def fitted(model: nn.Module, images: Tensor, time: float, bands: bool | None = None) -> Loss:
    """By a plan of `revseg.fit`, made on shapes alone; it stays on what is returned."""
    return _by(search_of(model, images, bands=bands).plan(time=time), model, None)


def halfway(model: nn.Module, images: Tensor) -> Loss:
    """Fitted to a budget halfway between the least and plain."""
    search = search_of(model, images, bands=True)
    budget = (search.before.peak + search.plan(time=ANY_TIME).peak) // 2
    return _by(search.plan(budget), model, budget)


def _by(plan: Plan, model: nn.Module, budget: int | None) -> Loss:
    ours: Any = plan.apply(model, CRITERION)
    loss = ours.loss if plan.by_bands else plain(ours, torch.empty(0))

    def run(images: Tensor, labels: Tensor) -> Tensor:
        return loss(images, labels)  # type: ignore[no-any-return]

    run.plan, run.model, run.budget = plan, ours, budget  # type: ignore[attr-defined]
    return run


def _wrapped(model: nn.Module, wrap: Callable[[int, Callable[..., Any]], Callable[..., Any]]) -> Loss:
    for i, block in enumerate(blocks(model)):
        block.forward = wrap(i, block.forward)  # type: ignore[method-assign]
    return plain(model, torch.empty(0))


def _is_layer(row: nn.Module) -> bool:
    """Whether a row is one of convolutions and norms, a block by itself."""
    return any(isinstance(child, (nn.Conv2d, nn.Conv3d)) for child in row.children())


def _in_segments(modules: list[nn.Module]) -> Callable[[Tensor], Any]:
    count = round(math.sqrt(len(modules)))
    return lambda x: checkpoint_sequential(modules, count, x, use_reentrant=False)  # type: ignore[no-untyped-call]


WAYS: dict[str, Callable[[nn.Module, Tensor], Loss]] = {
    "plain": plain,
    "checkpoint": checkpointed,
    "checkpoint sqrt": checkpointed_by_root,
    "torch-remat": torch_remat,
    "compile": lambda model, images: compiled(model, 1.0),
    "compile budget 0": lambda model, images: compiled(model, 0.0),
    "fit": lambda model, images: fitted(model, images, time=TIME),
    "fit, bands": lambda model, images: fitted(model, images, time=TIME, bands=True),
    "fit least": lambda model, images: fitted(model, images, time=ANY_TIME, bands=True),
    "fit halfway": halfway,
}
