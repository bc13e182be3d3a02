"""Gradients of a function that was run again.

The second run builds a graph from stand-ins of its inputs and parameters. Differentiating by
these gives back what the autograd function around it must return. A tensor that requires grad
and is none of them would lose its gradient without a word, so the graph is searched for such.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from revseg.tensors import describe

Grads = list[Tensor | None]


def gradients(
    edges: Sequence[GradientEdge],
    inputs: Sequence[Tensor],
    dys: Sequence[Tensor],
    name: str,
    before: Grads | None = None,
    create_graph: bool = False,
) -> Grads:
    """The gradient of each input, None where it has none.

    What was found before is added by autograd, not by us. Of a function that uses an input twice it adds
    one use after the other, (before + first) + second, and sums of floats depend on their order.

    Args:
        edges: Where the graph of each output ends; outputs themselves would stay alive for it.
        inputs: What to differentiate by, leaves or aliases; those that do not require grad get None.
        dys: The gradient of each output.
        name: The function, for the message.
        before: The gradients found so far, one for each input; left alone where it needs none.
        create_graph: Whether the gradients can be differentiated again.

    Raises:
        RuntimeError: If the graph reaches a leaf that is no input, whose gradient would be lost.
    """
    _refuse_strangers([edge.node for edge in edges], inputs, name)
    asked = [x for x in inputs if x.requires_grad]
    before = [None] * len(inputs) if before is None else before
    begun = [(x, dx) for x, dx in zip(inputs, before, strict=True) if dx is not None and x.requires_grad]
    roots, sent = [*edges, *(get_gradient_edge(x) for x, _ in begun)], [*dys, *(dx for _, dx in begun)]
    gradients = torch.autograd.grad(roots, asked, sent, allow_unused=True, create_graph=create_graph)
    if len(asked) == len(inputs):
        return list(gradients)
    found = iter(gradients)
    return [next(found) if x.requires_grad else dx for x, dx in zip(inputs, before, strict=True)]


def edge_of(y: Tensor) -> GradientEdge:
    """Where the graph of y ends; it stays alive though y goes.

    The node of a Python function is alive as long as what leads to it, and not every torch counts an edge: a view does.
    """
    if isinstance(y.grad_fn, torch._C._FunctionBase):
        with torch.enable_grad():
            y = y.view_as(y)
    return get_gradient_edge(y)


def total(dx: Tensor | None, before: Tensor | None, dh: Tensor) -> Tensor | None:
    """The gradient of an input and what was found before, in its own memory, as one more map would be a third.

    Args:
        dx: The gradient, which nobody else holds; or dh itself.
        before: The gradient so far.
        dh: A gradient that others hold.
    """
    if dx is None or before is None:
        return before if dx is None else dx
    return before + dx if dx is dh else dx.add_(before)


def alias(x: Tensor) -> Tensor:
    """The same tensor in the eyes of autograd, by which alone one can differentiate; with the same strides."""
    return x[...] if x.requires_grad else x


def _refuse_strangers(
    nodes: Sequence[torch.autograd.graph.Node], inputs: Sequence[Tensor], name: str
) -> None:
    known = {id(x) for x in inputs}
    seen = {x.grad_fn for x in inputs}  # no further than the inputs
    todo = [node for node in nodes if node not in seen]
    seen.update(todo)
    while todo:
        node = todo.pop()
        before = node.next_functions
        leaf = None if before else getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise RuntimeError(
                f"{name}: the function uses a tensor {describe(leaf)} that requires grad and is no parameter "
                "of it, so its gradient would be lost; make the function a torch.nn.Module that owns it "
                "(sharded by FSDP2: shard the sequence or the Recompute around it, or blocks with per_block=True)"
            )
        for each, _ in before:
            if each is not None and each not in seen:
                seen.add(each)
                todo.append(each)
