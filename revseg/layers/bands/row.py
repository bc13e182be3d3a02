"""A row of layers by bands, as those who run it see it: a first run, and the gradients of a second one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from revseg.engine.function import Coupled, Differentiate, Onto
from revseg.engine.gradients import Grads, total
from revseg.layers.bands.backward import gradients_by_bands
from revseg.layers.bands.cut import FIRST_RUN, BandPlan, Bands
from revseg.layers.bands.forward import find_statistics, write_values
from revseg.layers.bands.rows import Asked, Kept, Whole
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

    def __init__(self, layers: Sequence[Layer], x: Whole, bands: Bands) -> None:
        self.plan = BandPlan(layers, x, bands)
        self.tensors = self.plan.parameters

    def first_run(self, x: Whole, make_y: Callable[[], Whole], onto: Onto | None = None) -> Whole:
        """The output, in memory that is asked for when statistics have been found."""
        plan = self.plan if is_recomputing() else self.plan.wider(FIRST_RUN)
        with torch.no_grad(), noting() as self.noted, plan.no_autocast():
            there = find_statistics(plan, x, self.tensors)
            y = make_y()
            write_values(plan, x, self.tensors, there, {}, y, onto)
        return y

    def gradients(
        self,
        x: Whole,
        tensors: Sequence[Tensor],
        dz: Whole,
        wanted: Sequence[bool],
        make_dx: Callable[[], Whole] | None,
    ) -> Grads:
        """The gradient of each tensor in a second run, whose output nobody asks for; that of the input into `make_dx`'s memory."""
        plan = self.plan
        with torch.no_grad(), plan.no_autocast():
            with reminding(self.noted):
                find_statistics(plan, x, tensors)
            return gradients_by_bands(
                plan, x, tensors, dz, wanted, {}, make_dx, [*plan.kept(), *plan.kept_last()]
            )

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
        kept = {j: Kept() for j in plan.kept()} if asked else {}
        y = self._output(x, onto)
        with plan.no_autocast():
            with reminding(self.noted):
                find_statistics(plan, Whole(x), tensors)
            write_values(plan, Whole(x), tensors, {}, kept, Whole(y), onto)
        coupled = y, None if onto is None else plan.dtype
        if asked is None:
            return coupled, None

        @torch.no_grad()
        def differentiate(dh: Tensor, before: Grads) -> Grads:
            dx = Asked(Whole(x))
            with plan.no_autocast():
                of_tensors = gradients_by_bands(
                    plan,
                    dx.x,
                    tensors,
                    Whole(dh),
                    asked[1:],
                    kept,
                    dx if asked[0] else None,
                    plan.kept_last(),
                )
            found = [*dx.gradients(), *of_tensors]
            return [total(more, so_far, dh) for more, so_far in zip(found, before, strict=True)]

        return coupled, differentiate

    def rerun_with_graph(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        with torch.no_grad(), reminding(self.noted):
            find_statistics(self.plan, Whole(x.detach()), tensors)
        with self.plan.no_autocast():
            return self.plan.plain(x, tensors)

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
