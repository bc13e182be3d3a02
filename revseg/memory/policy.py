"""Memory policies: what a network computes again instead of keeping.

A network hands its parts to a policy while it is built, and gets back what stands in their places. Three
policies have names, the memory levels:

    fastest    keeps what its layers need, one raw map each; the twin of the other two
    balanced   reversible parts are undone, not kept
    lowest     and the other large parts run again from their input

In a network without reversible parts the blocks (a residual unit, or two to four layers that belong
together) run again from their input at all levels but the fastest; at the lowest whole stages do, and
the blocks inside of them once more.

The numbers, the parameters and the names in the state dict do not depend on the policy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from revseg.engine.exact import Exact
from revseg.layers.recompute import Recompute
from revseg.sequence import ReversibleSequence


@dataclass(frozen=True)
class MemoryPolicy:
    """What runs again or is undone; a subclass may decide for each part, in the order in which they are made.

    Args:
        blocks: Blocks run again from their input.
        stages: Stages do.
        sequences: Reversible blocks are undone.
        save_activations: Nothing of this happens, but could (`revseg.sequence.set_save_activations`): the
            network trains by ordinary autograd, and is made of the same modules.
    """

    blocks: bool = True
    stages: bool = False
    sequences: bool = True
    save_activations: bool = False

    @classmethod
    def of(cls, memory: Memory, save_activations: bool = False) -> MemoryPolicy:
        """The policy of a level, or the policy that was given.

        Raises:
            ValueError: If there is no such level.
            TypeError: If `memory` is neither a name nor a policy.
        """
        if isinstance(memory, str):
            if memory not in LEVELS:
                raise ValueError(f"unknown memory level {memory!r}; choose one of {', '.join(MEMORY_LEVELS)}")
            memory = LEVELS[memory]
        if not isinstance(memory, MemoryPolicy):
            raise TypeError(f"expected a memory level or a MemoryPolicy, got {type(memory).__name__}")
        return replace(memory, save_activations=True) if save_activations else memory

    def beside_sequences(self) -> MemoryPolicy:
        """For a network with reversible parts: its other blocks run again where stages would."""
        return replace(self, blocks=self.stages, stages=False)

    def block(self, module: nn.Module) -> nn.Module:
        """What stands in the place of a block."""
        return self._again(module) if self.blocks else module

    def stage(self, module: nn.Module) -> nn.Module:
        """What stands in the place of a stage, a row of blocks."""
        return self._again(module) if self.stages else module

    def sequence(self, couplings: Iterable[nn.Module], exact: Exact = False) -> nn.Module:
        """The couplings of a stage, in a row."""
        saved = self.save_activations or not self.sequences
        return ReversibleSequence(*couplings, save_activations=saved, exact=exact)

    def _again(self, module: nn.Module) -> nn.Module:
        return Recompute(module, save_activations=self.save_activations)


Memory = str | MemoryPolicy  # what a network takes: the name of a level, or a policy

LEVELS = {
    "lowest": MemoryPolicy(stages=True),
    "balanced": MemoryPolicy(),
    "fastest": MemoryPolicy(blocks=False, sequences=False),
}
MEMORY_LEVELS = tuple(LEVELS)
