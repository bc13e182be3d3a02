"""The ways to train a whole network: plain, PyTorch's own, the rivals', ours.

A way makes a network and the loss it is trained with, from the same seed the same weights. Blocks are what stands in
the rows of a network: the children of its Sequentials and lists, down to the first that is neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from benchmarks.compiling import compiling
from benchmarks.nets import Bottleneck, ResNet50FCN, UNet
from benchmarks.rivals import RIVALS, Net
from benchmarks.segmentation import CLASSES, batch, network, plain_loss, using_kernels
from revseg import Recompute, ReversibleSequence, fit, reversible
from revseg.layers.stack import Stack
from revseg.losses import UpsampleCrossEntropy
from revseg.memory import Plan

OURS = ("vnet", "segnet", "erfnet", "enet", "espnet", "dabnet", "pspnet")
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: UNet(CLASSES),
    "resnet50_fcn": lambda: ResNet50FCN(CLASSES),
}
NETWORKS = (*OURS, *OTHERS)
LEVELS = ("fastest", "balanced", "lowest", "least")
REVERSIBLE = ("memcnn", "revtorch", "revlib", "invtorch", "FrEIA")  # rivals that take V modules
Loss = Callable[[Tensor, Tensor], Tensor]
Shape = tuple[int, int, int]  # N, H, W


class NotAllowedError(Exception):
    """The network has nothing for this way to work on."""


@dataclass
class Training:
    """A network and how it is trained.

    Args:
        model: Holds the parameters and buffers.
        loss_of: Images and labels to the loss, with its graph.
        kernels: Whether our kernels are on.
        around: What a step stands in.
    """

    model: nn.Module
    loss_of: Loss
    kernels: bool = False
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward; the loss."""
        with ExitStack() as stack:
            stack.enter_context(using_kernels(self.kernels))
            stack.enter_context(self.around())
            loss = self.loss_of(images, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()


def _plainly_trained(model: nn.Module) -> Training:
    return Training(model, lambda images, labels: plain_loss(model(images), labels))


def _ours(model: nn.Module) -> Training:
    loss = UpsampleCrossEntropy()
    return Training(model, lambda images, labels: loss(model(images), labels), kernels=True)


def _made(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return OTHERS[name]() if name in OTHERS else network(name, **options)


def _plain_model(name: str) -> nn.Module:
    return _made(name, memory="fastest") if name in OURS else _made(name)


def plain(name: str) -> Training:
    """PyTorch's own modules and loss."""
    model = _plain_model(name)
    if name == "vnet":
        for sequence in _sequences(model):
            sequence.save_activations = True
    return _plainly_trained(model)


def channels_last(name: str) -> Training:
    """The same on maps and weights in the layout that convolutions prefer."""
    training = plain(name)
    training.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return training


def compiled(name: str, budget: float) -> Training:
    """torch.compile of network and loss, with its activation memory budget."""
    training = plain(name)
    loss_of = torch.compile(training.loss_of, dynamic=False)
    return Training(training.model, loss_of, around=lambda: compiling(budget))


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What stands in the rows of a network and has parameters."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and not _is_layer(child):
            yield from blocks(child)
        elif any(True for _ in child.parameters()):
            yield child


def _is_layer(row: nn.Module) -> bool:
    """Whether a Sequential is a row of convolutions and norms, a block by itself."""
    return any(isinstance(child, (nn.Conv2d, nn.ConvTranspose2d)) for child in row.children())


def _again(name: str, wrap: Callable[[int, Callable[..., Any]], Callable[..., Any]]) -> Training:
    """The plain network whose blocks are called through a wrapper."""
    training = plain(name)
    for i, block in enumerate(blocks(training.model)):
        block.forward = wrap(i, block.forward)  # type: ignore[method-assign]
    return training


def checkpointed(name: str) -> Training:
    """`torch.utils.checkpoint` of every block."""
    return _again(name, lambda i, call: lambda *args: checkpoint(call, *args, use_reentrant=False))


def checkpointed_by_root(name: str) -> Training:
    """`checkpoint_sequential` of every row of blocks, in about as many segments as each has blocks."""
    training = plain(name)
    rows = [
        row
        for row in training.model.modules()
        if isinstance(row, nn.Sequential) and len(row) > 2 and not _is_layer(row)
    ]
    if not rows:
        raise NotAllowedError("no rows of blocks")
    for row in rows:
        row.forward = _in_segments(list(row))  # type: ignore[method-assign]
    return training


def _in_segments(modules: list[nn.Module]) -> Net:
    segments = round(math.sqrt(len(modules)))
    return lambda x: checkpoint_sequential(modules, segments, x, use_reentrant=False)  # type: ignore[no-any-return, no-untyped-call]


def torch_remat(name: str) -> Training:
    """A region of torch-remat for every block, in which nothing is saved."""
    import torch_remat as package  # type: ignore[import-not-found]

    return _again(name, lambda i, call: package.checkpoint(region_name=f"block {i}")(call))  # type: ignore[no-any-return]


def saved_on_cpu(name: str) -> Training:
    """What autograd saves lies in the host's memory."""
    training = plain(name)
    if not torch.cuda.is_available():
        raise NotAllowedError("on a CPU it is plain")
    training.around = lambda: save_on_cpu(pin_memory=True)
    return training


def by_rival(name: str, way: str) -> Training:
    """The reversible sequences of the network, each block y1 = x1 + F(x2), y2 = x2 + y1, by another library."""
    training = plain(name)
    if not (sequences := _sequences(training.model)):
        raise NotAllowedError("no reversible blocks")
    for sequence in sequences:
        pairs: list[tuple[nn.Module, nn.Module]] = [(f, nn.Identity()) for f in _functions(sequence)]
        sequence.forward = _called(RIVALS[way](pairs))  # type: ignore[method-assign]
    return training


def _called(net: Net) -> Net:
    """The net as a function: a module put in the place of a method would become a child."""
    return lambda x: net(x)


def _sequences(model: nn.Module) -> list[ReversibleSequence]:
    return [module for module in model.modules() if isinstance(module, ReversibleSequence)]


def _functions(sequence: ReversibleSequence) -> list[nn.Module]:
    """F of every one-sided coupling."""
    return [coupling.f for coupling in sequence.blocks]  # type: ignore[misc, union-attr]


def level(name: str, memory: str, **options: Any) -> Training:
    """Ours at a memory level: of a network of ours its own, of another Stacks, and at the lowest run again."""
    if name in OURS:
        return _ours(_made(name, memory=memory, **options))
    if memory == "least":
        raise NotAllowedError("not a network of ours; see fit")
    model = _made(name)
    if memory != "fastest":
        _stack(model)
    if memory == "lowest":
        _recompute(model)
    return _ours(model)


def _stack(module: nn.Module) -> None:
    """Every row of layers becomes a Stack."""
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential) and _is_layer(child):
            setattr(module, name, Stack(*child))
        else:
            _stack(child)


def _recompute(module: nn.Module) -> None:
    """Every block runs again in the backward pass."""
    for name, child in module.named_children():
        if isinstance(child, (Stack, Bottleneck)):
            setattr(module, name, Recompute(child))
        else:
            _recompute(child)


def fitted(name: str, shape: Shape, time: float, bands: bool) -> Training:
    """The plain network by a plan of `revseg.fit`: the least memory in so many times plain's time, by bands or without.

    Args:
        name: The network.
        shape: N, H, W of the images that the plan is made for; it can be carried out at any other.
        time: At most so many times what a step takes, by the estimate of the plan.
        bands: Whether rows of layers may go by bands.
    """
    ours: Any = _plan(name, shape, time, bands).apply(plain(name).model, plain_loss)
    by_bands = ours.plan.by_bands  # the loss
    loss_of = ours.loss if by_bands else lambda images, labels: plain_loss(ours(images), labels)
    return Training(ours, loss_of, kernels=True)


@cache
def _plan(name: str, shape: Shape, time: float, bands: bool) -> Plan:
    images, labels = batch(shape, values=False, device="meta")
    return fit(plain(name).model, images, plain_loss, time=time, target=labels, bands=bands).plan


def exact(name: str, mode: bool | str) -> Training:
    """Ours, balanced, inverted bit for bit."""
    if name != "vnet":
        raise NotAllowedError("no reversible blocks")
    return level(name, "balanced", exact=mode)


def converted(name: str, **options: Any) -> Training:
    """Rows of residual blocks made reversible: another architecture, held against itself."""
    if name != "resnet50_fcn":
        raise NotAllowedError("no rows of residual blocks")
    return _ours(reversible(_made(name), torch.zeros(1, 3, 64, 64), **options)[0])


def converted_plain(name: str) -> Training:
    """The converted network in ordinary autograd."""
    model = converted(name, save_activations=True).model
    return _plainly_trained(model)


_AT_ANY_SIZE: dict[str, Callable[[str], Training]] = {
    "plain": plain,
    "plain, channels_last": channels_last,
    "compile": lambda name: compiled(name, 1.0),
    "compile budget 0": lambda name: compiled(name, 0.0),
    "checkpoint": checkpointed,
    "checkpoint sqrt": checkpointed_by_root,
    "torch-remat": torch_remat,
    "save_on_cpu": saved_on_cpu,
    **{way: lambda name, way=way: by_rival(name, way) for way in REVERSIBLE},  # type: ignore[misc]
    **{f"revseg {memory}": lambda name, memory=memory: level(name, memory) for memory in LEVELS},  # type: ignore[misc]
    "revseg exact": lambda name: exact(name, True),
    "revseg lossless": lambda name: exact(name, "lossless"),
    "revseg reversible": converted,
}
WAYS: dict[str, Callable[[str, Shape], Training]] = {
    **{way: lambda name, shape, make=make: make(name) for way, make in _AT_ANY_SIZE.items()},  # type: ignore[misc]
    "revseg fit": lambda name, shape: fitted(name, shape, 1.35, bands=False),
    "revseg fit bands": lambda name, shape: fitted(name, shape, 1.35, bands=True),
    "revseg fit least": lambda name, shape: fitted(name, shape, 10.0, bands=True),
}
TWINS = {"revseg reversible": converted_plain}  # of ways that change the network: what is right for them
