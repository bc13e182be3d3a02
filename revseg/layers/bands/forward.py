"""A row of layers by bands, forward: the statistics first, layer by layer, then the values.

The statistics of a raw map are those of its bands, added up. While they are taken its bands are kept, so that the next layer
reads them, and are let go as it does: at no time is there more than one raw map. Once statistics are known, a second run
takes all layers in one pass, and keeps nothing but what it is told to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from revseg import ops
from revseg.engine.function import Onto
from revseg.layers.bands.cut import BandPlan, of_band, statistics_of
from revseg.layers.bands.rows import Kept, NotKept, Whole
from revseg.layers.bands.walk import Source, Walk
from revseg.layers.norms import bn_act, bn_act_add
from revseg.replay.memo import remember


def find_statistics(
    plan: BandPlan, x: Whole, parameters: Sequence[Tensor], last: Kept | None = None
) -> Mapping[int, Kept]:
    """Sets `plan.statistics`, and moves running ones of batches on, unless they are remembered.

    Args:
        plan: The row of layers.
        x: Its input.
        parameters: Of all layers.
        last: Where the last raw map goes; by default into pieces of its own.

    Returns:
        The raw map that is there then, if any.
    """
    plan.statistics = []
    there: dict[int, Kept] = {}
    norms: list[ops.Norm] = []
    source = Source(plan, x, norms, parameters)
    for j in range(1, len(plan.layers) + 1):
        made = last if last is not None and j == len(plan.layers) else Kept()
        if j == 1 and plan.needs_no_map(x):
            made = NotKept()
        plan.statistics.append(remember(partial(_statistics, source, there, j, made)))
        norms.append(plan.norm(j - 1, parameters))
    return there


def _statistics(source: Source, there: dict[int, Kept], j: int, made: Kept) -> tuple[Tensor, Tensor]:
    """Mean and variance of raw map j; the map takes the place of the one that was there."""
    plan = source.plan
    layer = plan.layers[j - 1]
    if not layer.uses_batch():
        return layer.running()
    spent = max(there, default=None)
    parts = []
    for images in plan.groups:
        walk = Walk(source, images, there, spent, {j: made})
        parts += [of_band(walk.raw(j, *rows)) for rows in plan.cuts(j)]
        del walk  # with the rows that it holds, before the next one
    found = statistics_of(parts)
    if layer.is_by_image():
        layer.verify(plan.shapes[j])
    else:
        layer.move_running(plan.shapes[j], *found)
    there.clear()
    if not isinstance(made, NotKept):
        there[j] = made
    return found


def move_by_images(parts: Sequence[BandPlan]) -> None:
    """Moves the running statistics of instance norms on by those of all images, unless that is remembered."""
    for i, layer in enumerate(parts[0].layers):
        if layer.is_by_image() and layer.moves():
            mean, var = map(torch.stack, zip(*(part.statistics[i] for part in parts), strict=True))
            remember(partial(layer.move_running, parts[0].shapes[i + 1], mean, var))


def write_values(
    plan: BandPlan,
    x: Whole,
    parameters: Sequence[Tensor],
    there: Mapping[int, Kept],
    keep: Mapping[int, Kept],
    y: Whole,
    onto: Onto | None,
) -> None:
    """The output into y, or the sum of a stream and it; `there` is used up."""
    source = Source(plan, x, plan.norms(parameters), parameters)
    last = len(plan.layers)
    stream, sign = onto or (None, 0)
    added = None if stream is None else Whole(stream)
    spent = max(there, default=None)
    for images in plan.groups:
        walk = Walk(source, images, there, spent, plan.of_images(images, keep))
        for first, end in plan.cuts(last):
            u = walk.raw(last, first, end)
            if added is None:
                z = bn_act(u, source.norms[-1])
            else:
                z = bn_act_add(u, source.norms[-1], added.rows(images, first, end, plan.layout), sign)
            y.write(images, first, z)
        walk.finish()
        del walk  # with the rows that it holds, before the next one
