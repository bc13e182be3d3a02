"""An existing network made reversible: its rows of residual blocks become chains."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from revseg.convert.chain import ResidualChain
from revseg.convert.search import IsBlock, Search


@torch.no_grad()
def reversible(
    model: nn.Module, example: Any, *, is_block: IsBlock | None = None, at_least: int = 2, **options: Any
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
    passes through, and of every `nn.ModuleList` whose modules the network calls one after another, each with what
    the one before returned, which nothing else uses. A block keeps the shape of its input and is residual: with
    all its parameters zero it would hand on large positive values as they are, which x + F(x) and act(x + F(x)) do,
    and a convolution, a projected shortcut or batch norm after the sum do not.

    Neighbouring blocks form a chain, and a `ResidualChain` stands in the place of its first one. A parameter
    `layer2.1.conv.weight` is then `layer2.1.sequence.blocks.0.f.block.conv.weight`, and
    `layer2.2.conv.weight` is `layer2.1.sequence.blocks.1.f.block.conv.weight`; so weights cannot be
    loaded into the other architecture by mistake. Load trained weights before the conversion. In a
    `nn.Sequential` the modules behind a chain move up to the numbers that follow; in a `nn.ModuleList` they stay,
    and `nn.Identity` stands in the places of the other blocks.

    Args:
        model: Any network; left as it is.
        example: An input of the model, of any size that it takes, on its device; a tuple is several of them. The
            model runs on it in evaluation mode: once, and for a `nn.ModuleList` a few times more.
        is_block: Chooses the blocks among the modules that keep their shape: a class, several, or
            a function of the module. None for the rule above.
        at_least: Fewest blocks of a chain; shorter ones stay as they are.
        **options: Arguments of `ReversibleSequence`, like `exact="lossless"`.

    Returns:
        The converted copy, in the training mode of the model; and for each chain the names that
        its blocks had in the model.

    Memory: a chain keeps two maps for the backward pass, whatever its length.

    Raises:
        ValueError: If there is no chain of so many blocks, or `at_least` is less than 1. The message says of each
            module that might have been a block why it was passed over.
    """
    if at_least < 1:
        raise ValueError(f"expected at_least to be 1 or more, got {at_least}")
    search = Search(model, example, is_block, at_least)
    chains = search.chains()
    if not chains:
        wanted = "residual blocks" if is_block is None else "blocks that is_block accepts"
        raise ValueError(
            f"found no {wanted} that keep the shape of their input, {at_least} or more in a row, among the "
            "children of nn.Sequential and nn.ModuleList; choose others with is_block, or fewer with at_least."
            + search.report()
        )
    return with_chains(model, chains, **options), chains


@torch.no_grad()
def chains_of(model: nn.Module, example: Any) -> tuple[tuple[str, ...], ...]:
    """Names of the blocks of each chain that `reversible` would make, by the same rule; none if there are no such rows."""
    return tuple(map(tuple, Search(model, example, None, 2).chains()))


def with_chains(model: nn.Module, chains: Iterable[Sequence[str]], **options: Any) -> nn.Module:
    """A copy of a network in which these blocks are chains; the network itself, if there are none.

    Args:
        model: The network.
        chains: Names of blocks of one row each, as `reversible` and `chains_of` give them.
        **options: Arguments of `ReversibleSequence`.

    Raises:
        ValueError: If the network has no block of one of the names.
    """
    chains = list(chains)
    if not chains:
        return model
    there = dict(model.named_modules(remove_duplicate=False))
    missing = [name for names in chains for name in names if name not in there]
    if missing:
        raise ValueError(
            f"expected a network with a module {missing[0]!r}, got {type(model).__name__} without"
        )
    model = copy.deepcopy(model)
    for names in chains:
        _replace(model, names, options)
    for row in {model.get_submodule(_row_of(names[0])) for names in chains}:
        _renumber(row)
    return model


def _row_of(name: str) -> str:
    return name.rpartition(".")[0]


def _replace(model: nn.Module, names: Sequence[str], options: dict[str, Any]) -> None:
    """Put a chain in the place of the first of these modules of one row, and nothing in those of the others."""
    row = model.get_submodule(_row_of(names[0]))
    blocks = [model.get_submodule(name) for name in names]
    modes = [(module, module.training) for block in blocks for module in block.modules()]
    chain = ResidualChain(*blocks, **options).train(row.training)
    for module, mode in modes:
        module.training = mode  # frozen batch norm stays frozen
    first, *others = (name.rpartition(".")[2] for name in names)
    setattr(row, first, chain)
    for name in others:
        if isinstance(row, nn.ModuleList):
            setattr(row, name, nn.Identity())  # a network may count on the length
        else:
            delattr(row, name)


def _renumber(row: nn.Module) -> None:
    """The children of a `nn.Sequential` numbered without gaps, as its methods take them to be."""
    if all(name.isdecimal() for name in row._modules):
        children = list(row._modules.values())
        row._modules.clear()
        row._modules.update({str(i): child for i, child in enumerate(children)})
