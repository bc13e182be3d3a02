"""How the updates of one pass are undone. Here by `uncouple`, which rounds; `revseg.exact` has ways that do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revseg.engine.steps import Rule, Step, Streams, Update
from revseg.replay.context import Autocast, autocast_as


class Exactness:
    """How updates are undone in one pass; without more, by `uncouple`, which rounds."""

    rounds = True
    adds = True  # whether an additive update is undone by subtraction, up to what `restored` puts right

    def enter(self, x: Tensor) -> Tensor:
        """A stream at the door."""
        return x

    def rule(self, step: Step) -> Step:
        """The step with the rule that is undone so.

        Raises:
            ValueError: If it cannot be.
        """
        return step

    def begin(self, streams: Streams) -> None:
        """A forward pass begins with these streams."""

    def watch(self, name: str, x: Tensor) -> None:
        """Take note of a stream, to be judged at the end of the pass."""

    def update(
        self, step: Update, streams: Streams, h: Any, before: list[int], spent: bool, autocast: Autocast
    ) -> tuple[Tensor, list[Tensor], Any]:
        """The stream after the update by h, then what `after_update` gives.

        Args:
            step: The update.
            streams: Before it.
            h: The value of its function.
            before: The versions of source and target before the function ran.
            spent: Whether the memory of h may be written to.
            autocast: What the stream before the update will be found under.
        """
        y = step.checked(streams, h, before)
        if self.rounds:
            return y, [], None
        with autocast_as(autocast):
            return y, *self.after_update(step, streams[step.target], y, h)

    def after_update(self, step: Update, x: Tensor, y: Tensor, h: Tensor) -> tuple[list[Tensor], Any]:
        """What undoing the update of x to y by h needs: tensors, which autograd keeps, and a note of how they are read."""
        return [], None

    def judge(self) -> None:
        """Raise if a stream that was noted cannot be found again."""

    def resume(self, device: torch.device) -> None:
        """The backward pass begins."""

    def restored(self, back: Tensor, residue: Sequence[Tensor], note: Any) -> Tensor:
        """The stream before an additive update, from the difference of the stream after it and the value; in its memory."""
        return back

    def undo(self, rule: Rule, y: Tensor, h: Tensor, residue: Sequence[Tensor], note: Any) -> Tensor:
        """The stream before the update."""
        return rule.uncouple(y, h)
