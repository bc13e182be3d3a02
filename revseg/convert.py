"""An existing network made reversible: a change of its architecture.

A row of residual blocks, each b(x) = x + F(x) or act(x + F(x)), cannot be undone as it stands.
A `ResidualChain` of the same blocks can: two streams start as copies of the row's input, the blocks
update them in turn by what each of them changes, and at the end the input is counted once.

    y1 = x1 + (b1(x2) - x2),  y2 = x2 + (b2(y1) - y1),  ...       x1 = x2 = x
    output = y1 + y2 - x

Why streams as wide as the map, not halves of it. Every block stays what it is: it works on its
own number of channels, all parameters are kept, trained weights are a start. On halves each block
would have to be built anew at half its width, with a quarter of the parameters, and a block that
one knows only by calling it cannot be. The price is one more map than the row's output. Reversible
vision transformers have two whole streams for the same reason (Mangalam et al., Reversible Vision
Transformers, arXiv:2302.04869).

Why the change and not the block: x1 + b1(x2) would add the input again with every block. Why the
sum less the input, not the mean: it holds the whole of every change, as in the row, and the mean
the half. So two blocks compute what they did before. From the third on a block reads a stream that
lacks every second change before it: another network, to be trained or trained further.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from revseg.couplings import AdditiveCoupling
from revseg.engine.steps import Step, Update
from revseg.layers.stack import Stack
from revseg.sequence import ReversibleSequence

IsBlock = Callable[[nn.Module], bool] | type[nn.Module] | tuple[type[nn.Module], ...]

ROWS = (nn.Sequential.forward, Stack.forward)  # of modules that call their children in a row


class ResidualChain(nn.Module):
    """Residual blocks of one shape in a row, trained without storing their activations.

    Args:
        *blocks: Modules that keep the shape [N, ...] and dtype of the one tensor they take.
        **options: Arguments of the `ReversibleSequence` that runs them, like `exact`.

    Memory: two maps, whatever the number of blocks; and while a block is undone, its activations.

    Numerics: see `ReversibleSequence`. Where a map is exactly zero and a block adds exactly nothing, a
    ReLU after the sum stands at its kink, and rounding decides on its gradient; not so with
    `exact="lossless"`.
    """

    def __init__(self, *blocks: nn.Module, **options: Any) -> None:
        super().__init__()
        self.sequence = ReversibleSequence(
            [BlockCoupling(block, target=i % 2) for i, block in enumerate(blocks)], **options
        )

    def forward(self, x: Tensor) -> Tensor:
        # Each stream with a node of its own: gradients of x then add up in one order, stored or undone.
        y1, y2 = self.sequence((x.view_as(x), x.view_as(x)))
        return y1 + y2 - x  # type: ignore[no-any-return]


class BlockCoupling(AdditiveCoupling):
    """One stream updated by what a block changes about the other one.

    Args:
        block: A module that keeps the shape of its input.
        target: 0 or 1, the stream that is updated.
    """

    def __init__(self, block: nn.Module, target: int) -> None:
        nn.Module.__init__(self)
        self.f = _Change(block)
        self.target = target

    def steps(self, name: str = "") -> list[Step]:
        name = name or type(self).__name__
        return [Update(f"{name}, f", self.f, self, source=1 - self.target, target=self.target)]


class _Change(nn.Module):
    """F(x) of a block x + F(x)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) - x  # type: ignore[no-any-return]


@torch.no_grad()
def reversible(
    model: nn.Module, example: Tensor, *, is_block: IsBlock | None = None, at_least: int = 2, **options: Any
) -> tuple[nn.Module, list[list[str]]]:
    """A copy of a network whose chains of residual blocks are reversible.

    ```python
    model, chains = reversible(resnet, torch.randn(1, 3, 64, 64))
    print(chains)   # [["layer1.0", "layer1.1"], ["layer2.1", "layer2.2", "layer2.3"], ...]
    ```

    This changes the architecture. Chains of two blocks compute what they did; longer ones are
    another network of the same blocks and parameters, whose trained weights are only a start:
    train it, or train it further.

    Blocks are looked for among the children of every `nn.Sequential` (and `Stack`) that the example
    passes through. A block keeps the shape of its input and is residual: with all its parameters
    zero it would hand on large positive values as they are, which x + F(x) and act(x + F(x)) do,
    and a convolution, a projected shortcut or batch norm after the sum do not. (A network that calls
    its blocks one by one, from a `nn.ModuleList` say, has no such rows.) Neighbouring blocks form a chain, and a `ResidualChain` stands in the place of its first one. A parameter
    `layer2.1.conv.weight` is then `layer2.1.sequence.blocks.0.f.block.conv.weight`, and
    `layer2.2.conv.weight` is `layer2.1.sequence.blocks.1.f.block.conv.weight`; so weights cannot be
    loaded into the other architecture by mistake. Load trained weights before the conversion.

    Args:
        model: Any network; left as it is.
        example: An input of the model, of any size that it takes, on its device. The model runs on
            it once, in evaluation mode.
        is_block: Chooses the blocks among the modules that keep their shape: a class, several, or
            a function of the module. None for the rule above.
        at_least: Fewest blocks of a chain; shorter ones stay as they are.
        **options: Arguments of `ReversibleSequence`, like `exact="lossless"`.

    Returns:
        The converted copy, in the training mode of the model; and for each chain the names that
        its blocks had in the model.

    Memory: a chain keeps two maps for the backward pass, whatever its length.

    Raises:
        ValueError: If there is no chain of so many blocks, or `at_least` is less than 1.
    """
    if at_least < 1:
        raise ValueError(f"expected at_least to be 1 or more, got {at_least}")
    chains = list(_chains(model, example, is_block, at_least))
    if not chains:
        wanted = "residual blocks" if is_block is None else "blocks that is_block accepts"
        raise ValueError(
            f"found no {wanted} that keep the shape of their input, {at_least} or more in a row, among the "
            "children of nn.Sequential; choose others with is_block, or fewer with at_least"
        )
    model = copy.deepcopy(model)
    for names in chains:
        _replace(model, names, options)
    return model, chains


def _replace(model: nn.Module, names: list[str], options: dict[str, Any]) -> None:
    """Put a chain in the place of the first of these modules of one row, and nothing in those of the others."""
    row = model.get_submodule(names[0].rpartition(".")[0])
    blocks = [model.get_submodule(name) for name in names]
    modes = [(module, module.training) for block in blocks for module in block.modules()]
    chain = ResidualChain(*blocks, **options).train(row.training)
    for module, mode in modes:
        module.training = mode  # frozen batch norm stays frozen
    first, *others = (name.rpartition(".")[2] for name in names)
    setattr(row, first, chain)
    for name in others:
        delattr(row, name)


def _chains(
    model: nn.Module, example: Tensor, is_block: IsBlock | None, at_least: int
) -> Iterator[list[str]]:
    """The names of the blocks of each chain; of the outer chain where blocks hold blocks."""
    probe = copy.deepcopy(model).eval()
    with torch.random.fork_rng([example.device] if example.is_cuda else []):
        keepers = _keepers(probe, example)
        for parameter in probe.parameters():
            parameter.zero_()

        def accepts(name: str) -> bool:
            module = probe.get_submodule(name)
            if module not in keepers:
                return False
            if is_block is None:
                return _is_residual(module, keepers[module])
            given = model.get_submodule(name)
            return isinstance(given, is_block) if isinstance(is_block, (type, tuple)) else is_block(given)

        inside: tuple[str, ...] = ()  # what names begin with in the chains found so far
        for name, row in probe.named_modules():
            if type(row).forward not in ROWS or f"{name}.".startswith(inside):
                continue
            children = [f"{name}.{child}".lstrip(".") for child, _ in row.named_children()]
            for accepted, run in groupby(children, accepts):
                chain = list(run)
                if accepted and len(chain) >= at_least:
                    inside += tuple(f"{block}." for block in chain)
                    yield chain


def _keepers(model: nn.Module, example: Tensor) -> dict[nn.Module, Tensor]:
    """Children that only their rows call and that keep shape and dtype, each with an input of large values."""
    count: Counter[nn.Module] = Counter()
    kept: dict[nn.Module, Tensor] = {}
    changed = set()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        count[module] += 1
        x: Any = args[0] if len(args) == 1 and not kwargs else None
        tensors = isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point()
        if not tensors or (x.shape, x.dtype) != (y.shape, y.dtype):
            changed.add(module)
        else:
            kept[module] = 10 + torch.rand_like(x[:1])

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    model(example)
    for hook in hooks:
        hook.remove()
    rows = [row for row in model.modules() if type(row).forward in ROWS]
    children = {child for row in rows for child in row.children() if count[child] == count[row] > 0}
    return {module: x for module, x in kept.items() if module in children - changed}


def _is_residual(block: nn.Module, x: Tensor) -> bool:
    """Whether a block whose parameters are zero hands on large positive values, and not for lack of weights."""
    return any(p.ndim > 1 for p in block.parameters()) and torch.allclose(block(x), x, rtol=1e-3)
