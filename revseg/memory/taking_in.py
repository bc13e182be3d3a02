"""Which rows could take in the convolution behind them: found by what runs, as segments are.

A decoder ends, and a classifier follows, a module of its own somewhere else. If it alone reads what the row returned, both can
go by bands together (`revseg.memory.handed_on`), and the gradient of the map between never is whole.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

from revseg.engine.tracing import has_hooks
from revseg.layers.bands.cut import gives_scores
from revseg.layers.convolution import Convolution
from revseg.layers.stack_layer import Layer
from revseg.memory.row_by_bands import layers_of_row
from revseg.memory.segments import passes_on
from revseg.memory.trace import WITH_NEXT, Call, Tracer


def taking_in(tracer: Tracer, model: nn.Module, calls: list[Call]) -> list[Call]:
    """Calls of rows together with the convolutions behind them, put among the calls of what happens inside of them.

    Args:
        tracer: That has followed a step.
        model: The network.
        calls: All, those of segments too (`revseg.memory.segments.with_segments`).
    """
    modules = dict(model.named_modules())
    times = Counter(call.key for call in calls)
    behind = {
        call.given: call
        for call in tracer.calls_made
        if times[call.key] == 1 and call.given and _is_convolution(modules[call.key[0]])
    }
    rows = [call for call in calls if call.layers and times[call.key] == 1]
    in_row = {pair for call in calls for pair in pairwise(call.parts)}
    found = []
    rows.sort(key=lambda row: row.key[2] - row.key[1])  # the smallest first: it lies in the others
    for row in rows:
        conv = behind.get(row.parts[-1].made)
        if conv is None or (row.parts[-1], conv) in in_row or not _is_next(tracer, row.parts[-1], conv):
            continue
        names = [*(part.key[0] for part in row.parts), conv.key[0]]
        layers = layers_of_row(
            [modules[name] for name in names], torch.empty(row.shapes[0][0], device="meta")
        )
        if layers is not None and not (
            conv.dropped is not None and any(layer.is_by_image() for layer in layers)
        ):
            found.append(_together(row, conv, layers))
    for each in found:
        _put_among(each, calls, tracer)
    return found


def _is_next(tracer: Tracer, call: Call, conv: Call) -> bool:
    """Whether a convolution alone reads what a call returned, as it is or without some channels."""
    if conv.dropped is None:
        return passes_on(tracer, call, conv)
    if call.made != conv.given or call.late or len(call.outputs) != 1:
        return False
    began, ended = conv.dropped
    before, after = (tracer.read.get(each[0], ()) for each in (call.outputs, conv.inputs))
    by_others = [time for time in before if time > call.ended and not began < time <= ended]
    return not by_others and all(time <= ended or conv.began < time <= conv.ended for time in after)


def _is_convolution(module: nn.Module) -> bool:
    return not has_hooks(module) and Convolution.of(module) is not None


def _together(row: Call, conv: Call, layers: list[Layer]) -> Call:
    """The call of both."""
    common = 0
    while common < min(len(row.outer), len(conv.outer)) and row.outer[common] is conv.outer[common]:
        common += 1
    return replace(
        row,
        key=(*row.key[:3], WITH_NEXT),
        end=conv.end,
        cost=row.cost + conv.cost,
        copies=row.copies + conv.copies,
        products=[*row.products, *conv.products],
        ends_linear=True,
        shapes=conv.shapes,
        outer=row.outer[:common],
        parts=(*row.parts, conv),
        layers=len(layers),
        scores=gives_scores(layers),
        takes=conv.key[0],
        crossing=frozenset(
            key for call in (*row.outer[common:], *conv.outer[common:]) for key in (call.key, call.by_bands)
        ),
        largest=None,
    )


def _put_among(both: Call, calls: list[Call], tracer: Tracer) -> None:
    """Puts the call of both into the stacks of what happens inside of it."""
    inside, depth = {*both.parts}, len(both.outer)

    def filled(stack: tuple[Call, ...]) -> tuple[Call, ...]:
        return stack if inside.isdisjoint(stack) else (*stack[:depth], both, *stack[depth:])

    for call in calls:
        if inside.issuperset(call.parts or (call,)):
            call.outer = (*call.outer[:depth], both, *call.outer[depth:])
        else:
            call.outer = filled(call.outer)
    between = {*both.parts[-1].inputs} if both.parts[-1].dropped is not None else set()
    for block, kept in tracer.kept.items():
        own = kept.made[:depth] == both.outer and block in between
        kept.made = (*kept.made[:depth], both, *kept.made[depth:]) if own else filled(kept.made)
        kept.saved = [(node, filled(stack)) for node, stack in kept.saved]
