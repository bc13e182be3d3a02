"""A row of layers by bands, as those who run it see it: a first run, and the gradients of a second one."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping, Sequence

import torch
from torch import Tensor

from revseg.engine.function import Coupled, Differentiate, Onto
from revseg.engine.gradients import Grads, total
from revseg.layers.bands.backward import gradients_by_bands
from revseg.layers.bands.cut import FIRST_RUN, BandPlan, Bands
from revseg.layers.bands.forward import find_statistics, move_by_images, write_values
from revseg.layers.bands.rows import Asked, Kept, Whole, Written
from revseg.layers.stack_layer import Layer
from revseg.replay.call import is_recomputing
from revseg.replay.memo import noting, reminding
from revseg.tensors import CHANNELS_LAST, is_channels_last


class BandedRow:
    """A run of layers without a graph, by bands (`revseg.engine.function.Function`).

    Args:
        layers: All of ops with a window.
        x: The input, of which the shape counts.
        bands: How it is cut.
    """

    gives_new_memory = True

    def __init__(self, layers: Sequence[Layer], x: Whole, bands: Bands) -> None:
        self.plan = BandPlan(layers, x, bands)
        self.tensors = self.plan.parameters

    def first_run(self, x: Whole, make_y: Callable[[], Whole], onto: Onto | None = None) -> Whole:
        """The output, in memory that is asked for when statistics have been found; of one layer, before, as its raw map lies there."""
        wide = not is_recomputing() and not self.plan.needs_no_map(x)
        plan = self.plan.wider(FIRST_RUN) if wide else self.plan
        y: Whole | None = None
        with torch.no_grad(), noting() as self.noted, plan.no_autocast():
            parts = plan.parts()
            for part in parts:
                if y is None and len(part.layers) == 1:
                    y = make_y()
                fits = y is not None and y.parts[0].dtype == part.dtype and len(part.layers) == 1
                last = Written(y) if fits and y is not None else None
                there = find_statistics(part, x, self.tensors, last)
                y = make_y() if y is None else y
                write_values(part, x, self.tensors, there, {}, y, onto)
            move_by_images(parts)
        assert y is not None
        return y

    def take_statistics(self, x: Whole) -> None:
        """A second run whose output nobody asks for: it takes the statistics of the first one."""
        with torch.no_grad(), noting() as self.noted, self.plan.no_autocast():
            parts = self.plan.parts()
            for part in parts:
                find_statistics(part, x, self.tensors)
            move_by_images(parts)

    def gradients(
        self,
        x: Whole,
        tensors: Sequence[Tensor],
        dz: Whole,
        wanted: Sequence[bool],
        asked_dx: Asked | None,
    ) -> Grads:
        """The gradient of each tensor in a second run, whose output nobody asks for; that of the input into memory of `asked_dx`."""
        with torch.no_grad(), self.plan.no_autocast():
            parts = self._parts(x, tensors)
            return _gradients(parts, x, tensors, dz, wanted, {}, asked_dx)

    def _parts(self, x: Whole, tensors: Sequence[Tensor]) -> list[BandPlan]:
        """What goes through the row by itself, with its statistics; of a second run."""
        parts = self.plan.parts()
        with reminding(self.noted):
            for part in parts:
                find_statistics(part, x, tensors)
        return parts

    def run(self, x: Tensor, onto: Onto | None) -> Coupled:
        onto = self._fitting(onto)
        y = self.first_run(Whole(x), lambda: Whole(self._output(x, onto)), onto)
        return y.parts[0], None if onto is None else self.plan.dtype

    @torch.no_grad()
    def rerun(
        self, x: Tensor, tensors: Sequence[Tensor], onto: Onto | None, wanted: Sequence[bool] | None
    ) -> tuple[Coupled, Differentiate | None]:
        plan, onto = self.plan, self._fitting(onto)
        asked = wanted if wanted and any(wanted) else None
        y = self._output(x, onto)
        with plan.no_autocast():
            parts = self._parts(Whole(x), tensors)
            kept = {j: Kept() for j in plan.kept()} if asked and len(parts) == 1 else {}
            for part in parts:
                write_values(part, Whole(x), tensors, {}, kept, Whole(y), onto)
        coupled = y, None if onto is None else plan.dtype
        if asked is None:
            return coupled, None

        @torch.no_grad()
        def differentiate(dh: Tensor, before: Grads) -> Grads:
            dx = Asked(Whole(x))
            with plan.no_autocast():
                asked_dx = dx if asked[0] else None
                of_tensors = _gradients(parts, dx.x, tensors, Whole(dh), asked[1:], kept, asked_dx)
            found = [*dx.gradients(), *of_tensors]
            return [total(more, so_far, dh) for more, so_far in zip(found, before, strict=True)]

        return coupled, differentiate

    def rerun_with_graph(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            parts = self._parts(Whole(x.detach()), tensors)
        with self.plan.no_autocast():
            if len(parts) == 1:
                return parts[0].plain(x, tensors)
            return torch.cat([part.plain(x[part.images], tensors) for part in parts])

    def _fitting(self, onto: Onto | None) -> Onto | None:
        """The stream, if the value fits to it."""
        fits = (
            onto is not None
            and tuple(onto[0].shape) == tuple(self.plan.shapes[-1])
            and torch.promote_types(self.plan.dtype, onto[0].dtype) == onto[0].dtype
        )
        return onto if fits else None

    def _output(self, x: Tensor, onto: Onto | None) -> Tensor:
        """Memory for the value, laid out as the stream, or as the input."""
        if onto is not None:
            return torch.empty_like(onto[0])
        layout = CHANNELS_LAST[x.ndim] if is_channels_last(x) else torch.contiguous_format
        shape = tuple(self.plan.shapes[-1])
        return torch.empty(shape, dtype=self.plan.dtype, device=x.device, memory_format=layout)


def _gradients(
    parts: Sequence[BandPlan],
    x: Whole,
    tensors: Sequence[Tensor],
    dz: Whole,
    wanted: Sequence[bool],
    kept: MutableMapping[int, Kept],
    asked_dx: Asked | None,
) -> Grads:
    """The gradient of each tensor, added up over what goes through the row by itself; raw maps that are kept are used up."""
    found: Grads | None = None
    keep = [*(j for j in parts[0].kept() if j not in kept), *parts[0].kept_last()]
    for part in parts:
        more = part is not parts[-1]
        given = copy.copy(dz) if more else dz  # which lets it go
        found = gradients_by_bands(part, x, tensors, given, wanted, kept, asked_dx, keep, found, more)
        kept.clear()
    assert found is not None
    return found
