"""The ways to train a network that somebody brings: as it is, by PyTorch's own means and the rivals', and fitted.

A way takes the network, its images and its criterion, and gives the loss of images and labels. Blocks are what stands in
the rows and lists of a network (`benchmarks.network_ways.blocks`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from benchmarks.network_ways import NotAllowedError, blocks
from revseg import fit
from revseg.memory import predict

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
        with functorch.patch(activation_memory_budget=budget):
            return step(images, labels)  # type: ignore[no-any-return]

    return run


def fitted(model: nn.Module, images: Tensor, **wanted: Any) -> Loss:
    """`revseg.fit`, which plans on shapes alone; the plan stays on what is returned."""
    ours = fit(model, images, loss=CRITERION, **wanted)
    loss: Loss = ours.loss if ours.plan.by_bands else plain(ours, images)  # type: ignore[assignment, union-attr]

    def run(images: Tensor, labels: Tensor) -> Tensor:
        return loss(images, labels)

    run.plan, run.model = ours.plan, ours  # type: ignore[attr-defined]
    return run


def halfway(model: nn.Module, images: Tensor) -> Loss:
    """Fitted to a budget halfway between the least and plain."""
    before = predict(model, images, CRITERION).peak
    least = fit(model, images, loss=CRITERION, time=ANY_TIME).plan.peak  # type: ignore[union-attr]
    return fitted(model, images, budget=(before + least) // 2)


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
    "fit least": lambda model, images: fitted(model, images, time=ANY_TIME),
    "fit halfway": halfway,
}
