"""Memory levels: what a network computes again instead of keeping.

    fastest    keeps what its layers need, one raw map each; the twin of the other two
    balanced   reversible parts are undone, not kept
    lowest     and the other large parts run again from their input

In a network without reversible parts the blocks (a residual unit, or two to four layers that belong
together) run again from their input at all levels but the fastest; at the lowest whole stages do, and
the blocks inside of them once more.

The numbers, the parameters and the names in the state dict do not depend on the level.
"""

from torch import nn

from revseg.layers.recompute import Recompute

MEMORY_LEVELS = ("lowest", "balanced", "fastest")


def check_level(memory: str) -> None:
    """Refuse a level that is none.

    Raises:
        ValueError: If `memory` is not one of `MEMORY_LEVELS`.
    """
    if memory not in MEMORY_LEVELS:
        raise ValueError(f"unknown memory level {memory!r}; choose one of {', '.join(MEMORY_LEVELS)}")


def run_again(module: nn.Module, memory: str, save_activations: bool) -> nn.Module:
    """The module, to be run again at the lowest level."""
    return Recompute(module, save_activations=save_activations) if memory == "lowest" else module


def run_block_again(module: nn.Module, memory: str) -> nn.Module:
    """A block of a network without reversible parts, to be run again at all levels but the fastest."""
    return Recompute(module) if memory != "fastest" else module
