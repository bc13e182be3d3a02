"""What running again costs: a call once more, or a row by bands as often as its passes make each of its layers.

A row by bands makes what it reads as it reads it, and its maps lie as convolutions read them: what libraries copy of maps that
lie otherwise is spared, in all passes.
"""

from __future__ import annotations

from revseg.memory.trace import Call, Tracer

# Of a second run beside its operations, in the seconds of `revseg.memory.cost`: what it read is looked up, its buffers and random
# numbers are put back, its output is compared. Of an HRNet on 2 x 3 x 256 x 256, 113 parts, that is a sixth of the step.
SECOND_RUN = 1e-3


def time_again(call: Call, tracer: Tracer) -> float:
    """Seconds of a call that runs again, and makes its input again where it keeps the pieces of that."""
    return call.cost + _of_input(call, tracer)


def time_by_bands(call: Call, tracer: Tracer) -> float:
    """Seconds that a row takes more by bands than as a whole."""
    runs = runs_of_layers(call.layers, call.ends_linear, call.needs_no_map)
    if len(call.products) == len(runs):
        again = sum(times * seconds for times, seconds in zip(runs, call.products, strict=True))
    else:  # pools and norms are layers too
        again = sum(runs) / len(runs) * sum(call.products)
    spared = call.copies + sum(tracer.copies_at.get(node, 0.0) for node in range(call.start, call.end))
    return max(again - spared, 0.0) + (runs[0] + 1) * _of_input(call, tracer)


def runs_of_layers(layers: int, ends_linear: bool, needs_no_map: bool = False) -> list[int]:
    """How often the backward pass of a row by bands makes the raw map of each layer.

    Once for the sums of the last one, once in the pass of each later layer, once in its own. The last map, which is kept from the
    one to the other, spares the latter; where it has neither norm nor activation it is not asked for at all. Of a layer and a
    classifier without a map between them the first run makes the layer once more, and the last pass what the classifier
    hands back.
    """
    if needs_no_map:
        return [3, 1]
    sums = 0 if ends_linear else 1
    own_of_last = int(layers == 1 and not ends_linear)
    return [sums + layers - i + (1 if i < layers else own_of_last) for i in range(1, layers + 1)]


def _of_input(call: Call, tracer: Tracer) -> float:
    return sum(tracer.forward_at.get(node, 0.0) for node in {*call.spared})
