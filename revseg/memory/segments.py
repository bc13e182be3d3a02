"""Segments: modules that are called one after the other, and could run again as one.

Children of a row, entries of a list that a network goes through, `conv`, `norm` and `act` of a block: found by what runs, each
is called with what the one before it returned, which nobody else reads.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import nn

from revseg.engine.tracing import has_hooks
from revseg.layers.bands.cut import gives_scores
from revseg.memory.row_by_bands import layers_of_row
from revseg.memory.trace import AGAIN, Call, Tracer

LARGE = 64  # a map is, if it is at least this part of the peak
_OF_WEIGHTS = 2  # a map that goes by bands is so many times as large as the weights, at the least


def with_segments(tracer: Tracer, model: nn.Module) -> list[Call]:
    """All calls, those of segments too, put among the calls of what happens inside of them.

    A segment is made of modules that are called one after the other in one place, each with what the one before it
    returned, which nobody else reads: children of a row, entries of a list, `conv`, `norm` and `act` of a block.
    """
    for stack in tracer.late:
        for call in stack:
            call.late = True
    modules = dict(model.named_modules())
    at: dict[Call, list[Call]] = {}  # the segments around a call, the largest first
    calls = list(tracer.calls_made)
    most = tracer.peak() // LARGE
    for parent, lines in _lines(tracer).items():
        names = [call.key[0] for call in lines[0]]
        if any([call.key[0] for call in line] != names for line in lines):
            continue  # it does not do the same each time
        row = parent in modules and is_row(modules[parent])
        linked = [
            all(passes_on(tracer, line[i], line[i + 1]) for line in lines)
            and (
                row or all(line[i].shapes == line[i + 1].shapes for line in lines)
            )  # which somebody may read
            for i in range(len(names) - 1)
        ]
        large = [
            any(block.size > most for line in lines for block in line[i].outputs) for i in range(len(names))
        ]
        for begin, behind in _segments(names, linked, large, modules):
            if not row and not _can_lead(names, begin, behind, modules):
                continue
            for line in lines:
                parts = line[begin:behind]
                segment = Call(
                    (parent, begin, behind, AGAIN), parts[0].start, parts[-1].end, sum(c.cost for c in parts)
                )
                segment.parts = tuple(parts)
                segment.inputs, segment.writes = parts[0].inputs, parts[0].writes
                segment.remade, segment.parent = parts[0].remade, parts[0].parent
                segment.spared, segment.joined = parts[0].spared, parts[0].joined
                segment.shared = parts[0].shared
                segment.copies = sum(c.copies for c in parts)
                segment.products = [product for c in parts for product in c.products]
                segment.shapes = parts[-1].shapes
                segment.late = any(call.late for call in parts)
                segment.strange = any(call.strange for call in parts)
                segment.members = () if row else tuple(names[begin:behind])
                segment.layers = _layers([modules[name] for name in names[begin:behind]], segment)
                calls.append(segment)
                for part in parts:
                    at.setdefault(part, []).append(segment)
    for segments in at.values():
        segments.sort(key=lambda s: s.key[1] - s.key[2])

    def filled(stack: tuple[Call, ...]) -> tuple[Call, ...]:
        return tuple(each for call in stack for each in (*at.get(call, ()), call))

    for call in calls:
        around = () if call.parent is None else filled((*_parents(call.parent), call.parent))
        first = call.parts[0] if call.parts else call
        call.outer = (
            *around,
            *(s for s in at.get(first, ()) if s.key[2] - s.key[1] > call.key[2] - call.key[1]),
        )
    for kept in tracer.kept.values():
        kept.made = filled(kept.made)
        kept.saved = [(node, filled(stack)) for node, stack in kept.saved]
    return calls


def _layers(modules: list[nn.Module], segment: Call) -> int:
    """How many layers these are, if all can go by bands; else 0."""
    shape = segment.shapes[0][0] if len(segment.shapes) == 1 else ()
    if len(shape) not in (3, 4, 5) or segment.writes or segment.late:
        return 0
    weights = sum(p.nbytes for module in modules for p in module.parameters())
    if _OF_WEIGHTS * weights > math.prod(shape) * segment.shapes[0][1].itemsize:
        return 0  # their gradients, summed band by band, take more than maps
    layers = layers_of_row(modules, torch.empty(shape, device="meta")) or []
    segment.weights = weights
    segment.ends_linear, segment.scores = bool(layers) and layers[-1].is_linear(), gives_scores(layers)
    return len(layers)


def _parents(call: Call) -> tuple[Call, ...]:
    return () if call.parent is None else (*_parents(call.parent), call.parent)


def _lines(tracer: Tracer) -> dict[str, list[list[Call]]]:
    """By the name of a module, for each call of it the calls in it, in their order."""
    found: dict[Call | None, list[Call]] = {}
    for call in tracer.calls_made:
        found.setdefault(call.parent, []).append(call)
    lines: dict[str, list[list[Call]]] = {}
    for parent, line in found.items():
        lines.setdefault("" if parent is None else parent.key[0], []).append(line)
    return lines


def passes_on(tracer: Tracer, call: Call, following: Call) -> bool:
    """Whether a call reads what the one before it returned, and nobody else does."""
    if call.made != following.given or call.outputs != following.inputs or call.late:
        return False
    return not any(
        call.ended < time and not following.began < time <= following.ended
        for block in call.outputs
        if block not in following.outputs  # what is read later is what that one returned
        for time in tracer.read.get(block, ())
    ) and not any(
        call.ended < time <= following.began for block in call.outputs for time in tracer.read.get(block, ())
    )


def _can_lead(names: list[str], first: int, behind: int, modules: dict[str, nn.Module]) -> bool:
    """Whether the first can run the others: it is called once, nobody looks at them by hooks."""
    hooks = any(has_hooks(modules[name]) for name in names[first:behind])
    return names.count(names[first]) == 1 and not hooks


def _segments(
    names: list[str], linked: list[bool], large: list[bool], modules: dict[str, nn.Module]
) -> list[tuple[int, int]]:
    """First and behind the last of each: runs of linked calls, cut where a module with weights begins.

    Where maps are large also what leads to each of them: run again with one in the other, these keep none of those before.
    """
    found: dict[tuple[int, int], None] = {}
    begin = 0
    for end in range(1, len(names) + 1):
        if end < len(names) and linked[end - 1]:
            continue
        starts = [i for i in range(begin, end) if i == begin or _has_weights(modules[names[i]])]
        for i, j in _cuts(len(starts)):
            found[starts[i], starts[j] if j < len(starts) else end] = None
        for behind in starts[2:]:
            if large[behind - 1]:
                found[begin, behind] = None
        begin = end
    return [(first, behind) for first, behind in found if behind - first > 1]


def _has_weights(module: nn.Module) -> bool:
    return any(p.ndim > 1 for p in module.parameters())


def is_row(module: nn.Module) -> bool:
    """Whether a module calls its children one after the other."""
    own = type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__
    return isinstance(module, nn.Sequential) and own


def _cuts(length: int) -> list[tuple[int, int]]:
    """Segments of a row of this length: cut into 1, 2, 3, 4, 6, 8 and more equal pieces, and into single ones."""
    found = {}
    for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, length):
        if count <= length:
            found.update(dict.fromkeys(pairwise(round(i * length / count) for i in range(count + 1))))
    return list(found)
