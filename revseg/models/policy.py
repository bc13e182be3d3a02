"""Memory policies: what a network computes again instead of keeping.

A network hands its parts to a policy while it is built, and gets back what stands in their places. Four
policies have names, the memory levels:

    fastest    keeps what its layers need, one raw map each; the twin of the other two
    balanced   reversible parts are undone, not kept
    lowest     and the other large parts run again from their input
    least      and what is local goes by bands: its maps are never whole (`revseg.layers.bands`)

In a network without reversible parts the blocks (a residual unit, or two to four layers that belong
together) run again from their input at all levels but the fastest; at the lowest whole stages do, and
the blocks inside of them once more.

The numbers, the parameters and the names in the state dict do not depend on the policy; at the least level sums
go by bands, and round otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from revseg.exact.modes import Exact
from revseg.layers.bands.cut import Bands
from revseg.layers.bands.head import HeadByBands
from revseg.layers.bands.module import ByBands
from revseg.layers.blocks import BNAct
from revseg.layers.layer_module import LayerModule
from revseg.layers.recompute import Recompute
from revseg.layers.rerun import InGroups, Rerun
from revseg.layers.stack import Stack
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
        bands: How rows of layers go by bands; None for maps as a whole.
    """

    blocks: bool = True
    stages: bool = False
    sequences: bool = True
    save_activations: bool = False
    bands: Bands | None = None

    @classmethod
    def of(cls, memory: Memory, save_activations: bool = False, full_logits: bool = False) -> MemoryPolicy:
        """The policy of a level, or the policy that was given.

        Args:
            memory: One of both.
            save_activations: Whether nothing of it happens.
            full_logits: Whether logits at full size set the peak of the network: where these are not there is room
                for larger bands and more raw maps.

        Raises:
            ValueError: If there is no such level.
            TypeError: If `memory` is neither a name nor a policy.
        """
        if isinstance(memory, str):
            if memory not in LEVELS:
                raise ValueError(f"unknown memory level {memory!r}; choose one of {', '.join(MEMORY_LEVELS)}")
            memory = BESIDE_FULL_LOGITS.get(memory, LEVELS[memory]) if full_logits else LEVELS[memory]
        if not isinstance(memory, MemoryPolicy):
            raise TypeError(f"expected a memory level or a MemoryPolicy, got {type(memory).__name__}")
        return replace(memory, save_activations=True) if save_activations else memory

    def beside_sequences(self) -> MemoryPolicy:
        """For a network with reversible parts: its other blocks run again where stages would."""
        return replace(self, blocks=self.stages, stages=False)

    def keeping_no_maps(self) -> MemoryPolicy:
        """For a network whose maps differ much in size: rows by bands keep none of the largest."""
        return self if self.bands is None else replace(self, bands=replace(self.bands, kept=0))

    def block(self, module: nn.Module) -> nn.Module:
        """What stands in the place of a block."""
        return self._again(module) if self.blocks else module

    def residual(self, module: nn.Module) -> nn.Module:
        """What stands in the place of a block whose output is that of a ReLU, of its input and rows of layers.

        By bands these rows keep their input alone, which is the output of the block before, as the ReLU its own: nothing
        is left to run again.
        """
        return self.block(module) if self.bands is None else self._with_bands(module)

    def stage(self, module: nn.Module) -> nn.Module:
        """What stands in the place of a stage, a row of blocks."""
        if self.bands is None or not self.stages or not _is_long(module):
            return self._again(module) if self.stages else module
        return InGroups(module, whole=True, save_activations=self.save_activations)  # type: ignore[arg-type]

    def groups(self, module: nn.Module) -> nn.Module:
        """A row of blocks inside of a stage: at the least level groups of it run again."""
        if self.bands is None or not self.stages or not _is_long(module):
            return module
        return InGroups(module, whole=False, save_activations=self.save_activations)  # type: ignore[arg-type]

    def again(self) -> Rerun:
        """By what a network calls its parts that are methods: at the least level they run again."""
        return Rerun(self.bands is not None, save_activations=self.save_activations)

    def inner(self, module: nn.Module) -> nn.Module:
        """What stands in the place of a block inside of a row, or of a function: the whole goes by bands, if anything does."""
        return module if self.bands is not None else self.block(module)

    def row(self, module: nn.Module, streams: bool = False, ends: bool = False) -> nn.Module:
        """What stands in the place of a block that is a row of layers.

        Args:
            module: A `Stack`, or a module that is one layer.
            streams: Whether a sequence reads it, and would take its halves. By bands they are made as such.
            ends: Whether a part of the network ends with it that runs again by bands (`ByBands`).
        """
        if self.bands is None:
            return self.block(module)
        return ByBands(module, self.bands, streams=streams, ends=ends, save_activations=self.save_activations)

    def function(self, module: Stack) -> Stack:
        """The function of a coupling."""
        module.bands = self.bands
        return module

    def head(self, module: nn.Module) -> nn.Module:
        """What stands in the place of a convolution that ends a network."""
        if self.bands is None:
            return module
        return HeadByBands(module, self.bands, save_activations=self.save_activations)

    def sequence(self, couplings: Iterable[nn.Module], exact: Exact = False) -> nn.Module:
        """The couplings of a stage, in a row."""
        saved = self.save_activations or not self.sequences
        return ReversibleSequence(*couplings, save_activations=saved, exact=exact)

    def _again(self, module: nn.Module) -> nn.Module:
        if self.bands is not None and isinstance(module, (Stack, LayerModule)):
            return ByBands(self._with_bands(module), self.bands, save_activations=self.save_activations)
        return Recompute(self._with_bands(module), save_activations=self.save_activations)

    def _with_bands(self, module: nn.Module) -> nn.Module:
        """The same; the rows in it go by bands."""
        for part in module.modules():
            if self.bands is not None and isinstance(part, (Stack, LayerModule, BNAct)):
                part.bands, part.save_activations = self.bands, self.save_activations
        return module


def _is_long(module: nn.Module) -> bool:
    """Whether it is a row of blocks, not one of layers."""
    if not isinstance(module, nn.Sequential) or len(module) < 2:
        return False
    return not isinstance(module, Stack) or all(isinstance(part, Recompute) for part in module)


Memory = str | MemoryPolicy  # what a network takes: the name of a level, or a policy

LEVELS = {
    "least": MemoryPolicy(stages=True, bands=Bands()),
    "lowest": MemoryPolicy(stages=True),
    "balanced": MemoryPolicy(),
    "fastest": MemoryPolicy(blocks=False, sequences=False),
}
MEMORY_LEVELS = tuple(LEVELS)
BESIDE_FULL_LOGITS = {"least": replace(LEVELS["least"], bands=Bands(bytes=2 << 20, kept=1.5))}
