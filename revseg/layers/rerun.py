"""Parts of a network that run again without being modules of it: what a method does, and groups of a long row.

`Recompute` stands in the place of a module. Here names and structure of a network stay as they are, and what runs again is
put together for each call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from revseg.engine.tracing import has_hooks
from revseg.layers.recompute import Recompute


class Rerun(nn.Module):
    """Calls a method of a network; where it is on, what happens in it happens again in the backward pass.

    ```python
    self.again = Rerun(True)
    x = self.again(self._encode, (self.stem, self.stage1), images)   # keeps the images and x
    ```

    Args:
        on: Whether anything runs again.
        save_activations: True for the plain twin.
    """

    def __init__(self, on: bool, *, save_activations: bool = False) -> None:
        super().__init__()
        self.on, self.save_activations = on, save_activations

    def forward(self, run: Callable[..., Any], modules: Iterable[nn.Module], *inputs: Any) -> Any:
        """What `run` returns for the inputs.

        Args:
            run: A method.
            modules: All that it calls.
            inputs: Its arguments.
        """
        if not self.on or self.save_activations:
            return run(*inputs)
        return Recompute(_Part(run, modules))(*inputs)


class _Part(nn.Module):
    def __init__(self, run: Callable[..., Any], modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.run, self.parts = run, nn.ModuleList(modules)

    def forward(self, *inputs: Any) -> Any:
        return self.run(*inputs)


class InGroups(Recompute):
    """A row of blocks in groups that run again: of n inputs of blocks no more than twice the root of n are there at a time.

    The state dict is that of the row, without a prefix.

    Args:
        module: The row, of blocks that run again themselves: one more run of each.
        whole: Whether the row runs again as a whole too, and keeps its input alone.
        save_activations: True for the plain twin.
    """

    def __init__(self, module: nn.Sequential, *, whole: bool, save_activations: bool = False) -> None:
        super().__init__(module, save_activations=save_activations)
        self.whole = whole

    def forward(self, x: Tensor) -> Any:
        """What the row makes of x."""
        plain = self.save_activations or not torch.is_grad_enabled() or has_hooks(self.module)
        if plain or torch.compiler.is_compiling():
            return self.module(x)
        row: Any = self.module
        groups = _Groups(_blocks(row))
        return Recompute(groups)(x) if self.whole else groups(x)


class _Groups(nn.Module):
    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.row = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        size = math.ceil(math.sqrt(len(self.row)))
        for first in range(0, len(self.row), size):
            x = Recompute(nn.Sequential(*self.row[first : first + size]))(x)
        return x


def _blocks(row: nn.Sequential) -> Iterator[nn.Module]:
    """Of a row, and of rows in it."""
    for block in row:
        if type(block) is nn.Sequential:
            yield from _blocks(block)
        else:
            yield block
