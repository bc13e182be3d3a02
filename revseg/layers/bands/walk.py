"""Raw maps of a row of layers, made band by band, each row once.

Every layer holds the rows that the next one will read again, and no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from revseg import ops
from revseg.layers.bands.cut import BandPlan
from revseg.layers.bands.rows import Band, Images, Kept, Sliding, Whole
from revseg.layers.layer_input import lowered
from revseg.layers.norms import bn_act
from revseg.tensors import dense


class Source(NamedTuple):
    """What all passes over a row of layers read.

    Args:
        plan: The row of layers.
        x: The input.
        norms: What follows each raw map whose activated rows are read.
        parameters: Of all layers.
    """

    plan: BandPlan
    x: Whole
    norms: Sequence[ops.Norm]
    parameters: Sequence[Tensor]


class Walk:
    """The maps of a group of images, in order. Raw map 1 is that of the first layer; map 0 is the input.

    Args:
        source: What is read.
        images: The group.
        stored: Raw maps that are there.
        spent: Which of these is used up.
        keep: Where the rows of raw maps that are made are kept.
    """

    def __init__(
        self,
        source: Source,
        images: Images,
        stored: Mapping[int, Kept],
        spent: int | None = None,
        keep: Mapping[int, Kept] | None = None,
    ) -> None:
        self.plan, self.x, self.norms, self.parameters = source
        self.images = images
        self.stored = {j: kept for j, kept in stored.items() if kept.has(images)}
        self.spent, self.keep = spent, keep or {}
        self.sliding: dict[int, Sliding] = {}
        self.made = dict.fromkeys(self.keep, 0)  # rows of what is kept

    def raw(self, j: int, first: int, last: int) -> Tensor:
        """Rows first to last (excluded) of raw map j, those after the ones of the call before."""
        if j in self.stored:
            return dense(self.stored[j].rows(self.images, first, last, j == self.spent))
        start = self.made.get(j, first)  # nothing may be left out of what is kept
        parameters = self.plan.parameters_of(j, self.parameters)
        u = dense(self.plan.op(j).make_band(self.read(j, start, last), start, last, parameters))
        if j in self.keep:
            self.keep[j].append(self.images, start, u)
            self.made[j] = last
        return dense(u[:, :, first - start :])

    def finish(self) -> None:
        """Make the rows of what is kept that no other row has read."""
        for j in sorted(self.made, reverse=True):  # later ones read the earlier ones as these are made
            height = self.plan.shapes[j][2]
            if self.made[j] < height:
                self.raw(j, self.made[j], height)

    def read(self, j: int, first: int, last: int) -> Band:
        """What rows first to last of raw map j read."""
        height = self.plan.shapes[j - 1][2]
        low, high = self.plan.windows[j - 1].inside(first, last, height)
        return Band(self._activated(j - 1, low, high), low, height, self.images)

    def input(self, first: int, last: int) -> Tensor:
        """Rows of the input."""
        return lowered(self.x.rows(self.images, first, last, self.plan.layout), self.plan.cast)

    def _activated(self, j: int, first: int, last: int) -> Tensor:
        if j == 0:
            return self.input(first, last)
        if j not in self.sliding:
            self.sliding[j] = Sliding()
        return self.sliding[j].rows(first, last, partial(self._activate, j))

    def _activate(self, j: int, first: int, last: int) -> Tensor:
        u = self.raw(j, first, last)
        owned = j not in self.stored and j not in self.keep
        return bn_act(u, self.norms[j - 1], out=u if owned else None)
