"""A row of layers by bands, backward: a pass for each layer, from the last one to the first.

The gradient of a raw map needs two sums over all of it, of dn and of dn * (u - mean), where dn is the gradient of the
normalised map. So a pass goes over the bands of layer j with the sums of its map at hand, and

    makes raw map j, and what it was made of, once more from the nearest raw map that is kept,
    takes the gradient of raw map j, of the weight, and of the activated map j - 1,
    and adds up, of the latter, the sums that the next pass will need.

Gradients of maps exist in the bands that the next pass has not read yet: one map in all. Where maps are of one shape they lie in
one piece of memory, in which each pass writes over what it has read; the last raw map lay there before, the gradient of the
input does in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial

import torch
from torch import Tensor

from revseg.engine.gradients import Grads
from revseg.layers.bands.cut import BandPlan
from revseg.layers.bands.rows import Asked, Band, Images, InPlace, Kept, NotKept, Rows, Sliding, Whole
from revseg.layers.bands.walk import Source, Walk
from revseg.layers.linear import summed
from revseg.layers.norms import bn_act, bn_act_gradient, bn_act_sums
from revseg.tensors import dense

Incoming = Callable[[Images, int, int], Tensor]  # rows of the gradient of an activated map


def gradients_by_bands(
    plan: BandPlan,
    x: Whole,
    parameters: Sequence[Tensor],
    dz: Whole,
    wanted: Sequence[bool],
    kept: MutableMapping[int, Kept],
    asked_dx: Asked | None,
    keep: Sequence[int] = (),
    before: Grads | None = None,
    more: bool = False,
) -> Grads:
    """The gradient of each parameter; that of the input is written to what `asked_dx` gives.

    Args:
        plan: The row of layers, which has its statistics.
        x: The input.
        parameters: Of all layers.
        dz: The gradient of the output; let go when it has been read.
        wanted: Whether the gradient of each parameter is.
        kept: Raw maps that are there; used up.
        asked_dx: Memory for the gradient of the input, asked for when it is needed; None if that is not wanted.
        keep: Raw maps that are to be kept as they are first made.
        before: Gradients of other images, which are added.
        more: Whether images follow; gradients are as wide as sums then.
    """
    norms = plan.norms(parameters)
    found: Grads = [None] * len(parameters) if before is None else before
    incoming: Incoming = partial(dz.rows, layout=plan.layout)
    last = len(plan.layers)
    keeping = {j: plan.kept_map(j) for j in keep}
    source = Source(plan, x, norms, parameters)
    if plan.is_linear(last):  # its gradient is that of its raw map
        keeping.pop(last, None)
        sums = norms[-1].mean.new_zeros(3, len(norms[-1].mean))
    else:
        sums = _sums_of_last(source, incoming, kept, keeping)
        kept.update(keeping)
        keeping = {}
    anew = plan.needs_no_map(x)  # the gradient of the map between
    of_map = kept.get(last)  # where the gradient of the map before goes, if it fits
    for j in range(last, 0, -1):
        slots = plan.slots[j - 1]
        of_norm = [sums[1] * norms[j - 1].inverse_deviation, sums[0], sums[2]]
        for slot, vector in zip(slots[-3:], of_norm, strict=True):
            if slot is not None and wanted[slot]:
                p = parameters[slot]
                whole = vector if p.numel() == len(vector) else vector.sum()  # one slope for all channels
                _add(found, slot, whole.view(p.shape), None if more else p.dtype)
        below = [slot for each in plan.slots[: j - 1] for slot in each if slot is not None]
        of_op = [slot for slot in slots[:-3] if slot is not None]
        asked = [wanted[slot] for slot in of_op]
        deeper = any(wanted[slot] for slot in below)
        if not (any(asked) or deeper or asked_dx is not None):
            break
        keeping |= {m: plan.kept_map(m) for m in plan.kept_by(j)}
        there = NotKept() if anew and j == last else of_map
        a_pass = _Pass(source, j, sums, kept, keeping, asked, deeper, asked_dx, there)
        of_weights = a_pass.run(incoming)
        if j < last or not anew:
            dz.release()
        kept.update(keeping)
        keeping = {}
        for slot, gradient in zip(of_op, of_weights, strict=True):
            _add(found, slot, gradient, None if more else parameters[slot].dtype)
        of_map, sums = a_pass.gradient, a_pass.sums
        if isinstance(of_map, NotKept) and j == last:
            incoming = partial(_rows_before_last, plan, parameters, incoming)
        else:
            incoming = partial(of_map.rows, spend=True)
    return found


def _rows_before_last(
    plan: BandPlan, parameters: Sequence[Tensor], incoming: Incoming, images: Images, first: int, end: int
) -> Tensor:
    """Rows of the gradient of what the last layer reads, of one that is linear, made of those of its own."""
    last = len(plan.layers)
    rows, (_, channels, height, *across) = plan.shapes[last][2], plan.shapes[last - 1]
    start, stop = plan.windows[-1].readers(first, end, rows)
    du = Band(incoming(images, start, stop), start, rows, images)
    x = Band(du.values.new_empty(len(du.values), channels, 0, *across), 0, height, images)
    return dense(plan.op(last).band_input_gradient(du, x, first, end, plan.parameters_of(last, parameters)))


def _sums_of_last(
    source: Source,
    incoming: Incoming,
    kept: MutableMapping[int, Kept],
    keeping: MutableMapping[int, Kept],
) -> Tensor:
    plan, norms = source.plan, source.norms
    last = len(plan.layers)
    sums = norms[-1].mean.new_zeros(3, len(norms[-1].mean))
    for images in plan.groups:
        walk = Walk(source, images, kept, None, plan.of_images(images, keeping))
        for first, end in plan.cuts(last):
            sums += bn_act_sums(walk.raw(last, first, end), incoming(images, first, end), norms[-1])
        walk.finish()
    return sums


def _add(found: Grads, slot: int, gradient: Tensor | None, dtype: torch.dtype | None) -> None:
    """A gradient in its place, onto the sum of those before; of this dtype if it is the last one."""
    (total,) = summed([found[slot]], [gradient])
    found[slot] = total if total is None or dtype is None else total.to(dtype)


class _Pass:
    """The pass for layer j.

    Attributes:
        gradient: Of the activated map j - 1, for the next pass.
        sums: What that needs of it [3, C].
    """

    def __init__(
        self,
        source: Source,
        j: int,
        sums: Tensor,
        kept: MutableMapping[int, Kept],
        keeping: Mapping[int, Kept],
        asked: Sequence[bool],
        deeper: bool,
        asked_dx: Asked | None,
        there: Kept | None,
    ) -> None:
        plan, norms = source.plan, source.norms
        self.source, self.plan, self.norms, self.j = source, plan, norms, j
        self.of_map = sums if plan.batch[j - 1] else None
        self.own = kept.pop(j, None)
        self.kept, self.keeping = kept, keeping
        self.asked, self.deeper = asked, deeper or asked_dx is not None
        self.op, self.window = plan.op(j), plan.windows[j - 1]
        self.of_op = plan.parameters_of(j, source.parameters)
        self.height, self.rows = plan.shapes[j - 1][2], plan.shapes[j][2]
        self.gradient = plan.map_of_gradient(j, there)
        self.dx = self._memory_of_dx(asked_dx, self.gradient) if j == 1 else None
        if j > 1:
            self.sums = norms[j - 2].mean.new_zeros(3, plan.shapes[j - 1][1])
        else:
            self.sums = sums

    @staticmethod
    def _memory_of_dx(asked_dx: Asked | None, there: Kept) -> Whole | None:
        if isinstance(there, InPlace) and asked_dx is not None:
            asked_dx.give(there.whole)
        return None if asked_dx is None else asked_dx()

    def run(self, incoming: Incoming) -> Grads:
        """The gradients of the op's parameters."""
        total: Grads = [None] * len(self.of_op)
        for images in self.plan.groups:
            total = self._group(images, incoming, total)
        return total

    def _group(self, images: Images, incoming: Incoming, total: Grads) -> Grads:
        walk = Walk(self.source, images, self.kept, None, self.plan.of_images(images, self.keeping))
        before = _Before(walk, self.j - 1)
        held, done = _Held(), 0
        for first, last in self.plan.cuts(self.j):
            end = self.height if last == self.rows else self.window.finished(last)
            end = min(max(end, done), self.height) if self.deeper else done
            low, high = self.window.inside(first, last, self.height)
            start = self.window.readers(done, max(end, done + 1), self.rows)[0]
            if end > done and self.op.input_gradient_reads_input:
                low = min(low, max(self.window.read(start, start + 1)[0], 0))
            x = Band(before.rows(low, high, end), low, self.height, images)
            du = self._of_raw_map(images, first, last, x, incoming)
            if any(self.asked):
                more = self.op.band_parameter_gradients(du, x, first, self.of_op, self.asked)
                total = summed(total, more)
            if not self.deeper:
                continue
            band = Band(held.with_more(du, first, start), held.first, self.rows, images)
            del du
            if not self.op.input_gradient_reads_input:
                x = Band(x.values[:, :, :0], 0, self.height, images)
            usual = (
                last - first
            ) * self.window.step  # the last band has rows too that waited for it, and zeros beside them
            step = max(1, usual if end - done <= usual else usual // 2)
            for low in range(done, end, step):
                high = min(low + step, end)
                dz = dense(self.op.band_input_gradient(band, x, low, high, self.of_op))
                self._hand_on(images, low, dz, before)
                del dz
            done = end
        walk.finish()
        return total

    def _of_raw_map(self, images: Images, first: int, last: int, x: Band, incoming: Incoming) -> Tensor:
        """Rows of the gradient of raw map j."""
        dz = incoming(images, first, last)
        if self.plan.is_linear(self.j):
            return dz.clone() if isinstance(self.gradient, InPlace) else dz  # the rows will be written over
        u = self._own_map(images, first, last, x)
        return bn_act_gradient(u, dz, self.norms[self.j - 1], self.of_map, self.plan.values(self.j))

    def _own_map(self, images: Images, first: int, last: int, x: Band) -> Tensor:
        """Rows of raw map j."""
        if self.own is not None and self.own.has(images):
            return dense(self.own.rows(images, first, last, spend=True))
        return dense(self.op.make_band(x, first, last, self.of_op))

    def _hand_on(self, images: Images, first: int, dz: Tensor, before: _Before) -> None:
        """Rows of the gradient of the activated map j - 1."""
        if self.j == 1:
            assert self.dx is not None
            self.dx.write(images, first, dz)
            return
        u = before.raw(first, first + dz.shape[2])
        self.sums += bn_act_sums(u, dz, self.norms[self.j - 2])
        self.gradient.append(images, first, dz)


class _Before:
    """Map j - 1, raw and activated; or the input, if that is it."""

    def __init__(self, walk: Walk, j: int) -> None:
        self.walk, self.j = walk, j
        self.raws, self.activated = Sliding(), Sliding()

    def rows(self, first: int, last: int, raw_last: int) -> Tensor:
        """Activated rows first to last (excluded); raw ones are there then from `first` on, to the later of two ends."""
        if self.j == 0:
            return self.walk.input(first, last)
        self.raws.rows(first, max(last, raw_last), partial(self.walk.raw, self.j))
        return self.activated.rows(first, last, self._activate)

    def raw(self, first: int, last: int) -> Tensor:
        return dense(self.raws.peek(first, last))

    def _activate(self, first: int, last: int) -> Tensor:
        return bn_act(self.raw(first, last), self.walk.norms[self.j - 1])


class _Held:
    """Rows of the gradient of raw map j that rows to come read again."""

    def __init__(self) -> None:
        self.first = 0
        self.held = Rows()

    def with_more(self, du: Tensor, first: int, start: int) -> Tensor:
        """The rows from `start` on, the new ones, from `first` on, below those that were there."""
        if self.held.values is None or start >= first:
            self.first = first
            return self.held.put(du)
        drop = max(0, start - self.first)
        self.first += drop
        return self.held.move_on(drop, du)
