"""The contracts of reversible blocks, for our tests and for blocks of your own.

    from revseg.testing import check
    check(AdditiveCoupling(f, g), torch.randn(2, 64, 33, 47))

`check` is silent or says in one sentence what is wrong. It works on copies: parameters,
gradients, running statistics and random state of the block stay as they were.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from revseg import ops
from revseg.engine.drift import InversionError
from revseg.engine.steps import Step, Streams, Update
from revseg.replay.call import Call
from revseg.sequence import ReversibleSequence, set_save_activations
from revseg.tensors import versions

M = TypeVar("M", bound=nn.Module)
DEPTH = 8  # blocks in a row for the question whether rounding is amplified


class ContractError(AssertionError):
    """A block does not do what activation-free training needs."""


@dataclass(frozen=True)
class Outcome:
    """What one training step leaves behind."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor | None]  # by name; "input 0", "input 1" for the inputs
    buffers: dict[str, Tensor]


def training_step(module: nn.Module, x: Tensor | Sequence[Tensor], seed: int = 0) -> Outcome:
    """The outcome of one forward and backward pass of a copy of the module.

    Args:
        module: Takes what x is, returns a tensor or a pair.
        x: A tensor [N, C, ...] or a pair; converted to the dtype of the module's parameters.
        seed: Seeds random numbers and the gradient that is sent back.
    """
    module = copy.deepcopy(module)
    module.zero_grad()
    dtype = next((p.dtype for p in module.parameters()), None)
    inputs = [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in _tuple(x)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        outputs = _tuple(module(inputs[0] if isinstance(x, Tensor) else tuple(inputs)))
        generator = torch.Generator().manual_seed(seed)
        dy = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
        torch.autograd.backward(outputs, dy)
    gradients = {f"input {i}": t.grad for i, t in enumerate(inputs)}
    gradients.update({name: p.grad for name, p in module.named_parameters()})
    return Outcome(tuple(y.detach() for y in outputs), gradients, dict(module.named_buffers()))


def distances(outcome: Outcome, reference: Outcome) -> dict[str, float]:
    """Relative L2 distances of outputs, gradients and buffers, each taken as one long vector.

    Single tensors would mislead: the bias of a convolution before a batch norm has a gradient of
    zero, and any rounding is infinitely far from that.

    Raises:
        ContractError: If one outcome has a gradient where the other has None.
    """
    for name, gradient in reference.gradients.items():
        if (gradient is None) != (outcome.gradients[name] is None):
            has, lacks = ("plain", "reversible") if gradient is not None else ("reversible", "plain")
            raise ContractError(
                f"the gradient of {name} is None in the {lacks} run, but not in the {has} one"
            )
    return {
        "outputs": _distance(outcome.outputs, reference.outputs),
        "gradients": _distance(_present(outcome.gradients), _present(reference.gradients)),
        "buffers": _distance(outcome.buffers.values(), reference.buffers.values()),
    }


def plain_twin(module: nn.Module) -> nn.Module:
    """A copy of the module in which every `ReversibleSequence` and `Recompute` stores its activations."""
    module = copy.deepcopy(module)
    set_save_activations(module, True)
    return module


def check(block: nn.Module, x: Tensor | Sequence[Tensor], depth: int = DEPTH) -> None:
    """Raise, with one sentence, if the block cannot be trained without its activations.

    Args:
        block: A coupling or a reversible down-sampling, in the mode (train or eval) of its use.
        x: An input of realistic size and scale, [N, C, ...] or a pair of streams.
        depth: Blocks in a row, copies of this one, that must still be invertible in the dtype of x.

    Raises:
        ContractError: If a function gives other values when it is run again, `uncouple` does not
            undo `couple`, a gradient or buffer differs from plain autograd in float64 (on the CPU, if the
            device has none), or rounding errors grow too much.
    """
    try:
        _check_steps(block, x)
        _check_against_plain(block, x)
        if depth > 1 and all(isinstance(step, Update) for step in block.steps()):  # type: ignore[operator]
            training_step(ReversibleSequence([copy.deepcopy(block) for _ in range(depth)]), x)
    except InversionError as error:
        dtype = str(_tuple(x)[0].dtype).removeprefix("torch.")
        raise ContractError(
            f"{type(block).__name__} amplifies rounding errors too much for {depth} blocks in {dtype}: "
            + str(error).split(", more than")[0]
        ) from None
    except (RuntimeError, ValueError, TypeError) as error:
        raise ContractError(str(error)) from error


def inversion_bound(sequence: ReversibleSequence, x: Tensor) -> float:
    """How far the reconstructed input may be from x, relative L2 of the worse stream.

    Found in float64 alone: the chain is run there and back with a random error of half a unit in
    the last place of x's dtype at every update, and of eight times that in every function value.
    Twice the largest of three draws is the bound. Measured errors are 0.1 to 0.5 of it, in
    float32, float64 and bfloat16, for 1 to 64 blocks.

    Args:
        sequence: Blocks without randomness, in the mode (train or eval) of their use.
        x: The input [N, C, ...] in the dtype of interest.
    """
    unit = torch.finfo(x.dtype).eps / 2
    sequence = _doubled(sequence, x.device)
    steps = [step for block in sequence for step in block.steps()]  # type: ignore[operator]
    start = sequence._enter(_double(x.detach()))
    worst = 0.0
    with torch.no_grad():
        for draw in range(3):
            generator = torch.Generator().manual_seed(draw)
            streams = start
            for step in steps:
                streams = _disturbed(step, streams, unit, generator, inverse=False)
            for step in reversed(steps):
                streams = _disturbed(step, streams, unit, generator, inverse=True)
            errors = [_distance([found], [wanted]) for found, wanted in zip(streams, start, strict=True)]
            worst = max(worst, *errors)
    return 2 * worst


def _disturbed(
    step: Step, streams: Streams, unit: float, generator: torch.Generator, inverse: bool
) -> Streams:
    """The streams one step on, or back, with random rounding errors."""

    def rounded(x: Tensor, units: float) -> Tensor:
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        return x * (1 + units * unit * (2 * noise - 1))

    if not isinstance(step, Update):
        return step.inverse(streams) if inverse else step.forward(streams)
    rule = step.rule.uncouple if inverse else step.rule.couple
    h = rounded(step.fn(streams[step.source]), 8)
    return step.replace(streams, rounded(rule(streams[step.target], h), 1))


def _check_steps(block: nn.Module, x: Tensor | Sequence[Tensor]) -> None:
    """Each update for itself: is it repeatable, can it be undone, is its derivative right?"""
    block = copy.deepcopy(block)
    streams: Streams = ReversibleSequence()._enter(x)
    with torch.random.fork_rng(), torch.no_grad():
        for step in block.steps():  # type: ignore[operator]
            if isinstance(step, Update):
                _check_update(step, streams)
            streams = step.forward(streams)
            streams = streams[0].detach(), streams[1].detach()


def _check_update(step: Update, streams: Streams) -> None:
    call = Call(step.fn)
    source, x = streams[step.source], streams[step.target]
    before = versions(source, x)
    h, replay = call.run(source)
    step.checked(streams, h, before)
    again = call.rerun(replay, source, parameters=call.parameters)
    if not torch.equal(again, h) and bool(h.isfinite().all()):
        raise ContractError(
            f"{step.name}: the function gives other values when it is run again on the same input "
            f"(off by {_distance([again], [h]):.2g}): it has hidden state, or draws random numbers that are not torch's"
        )
    x64, h64 = _double(x), _double(h)
    rule = step.rule
    if isinstance(rule, nn.Module):
        rule = _doubled(rule, x.device).requires_grad_(False)
    y64 = rule.couple(x64, h64).detach()
    undone = _distance([rule.uncouple(y64, h64)], [x64])
    if not undone <= 1e-9:
        raise ContractError(
            f"{step.name}: uncouple(couple(x, h), h) must be x, and is off by {undone:.2g} in float64"
        )
    with torch.enable_grad():
        x64, h64 = x64.requires_grad_(), h64.requires_grad_()
        wanted = torch.autograd.grad(
            rule.couple(x64, h64), (x64, h64), y64, allow_unused=True, materialize_grads=True
        )
    found = rule.gradients(x64.detach(), h64.detach(), y64.detach())
    off = _distance(
        (torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)), wanted
    )
    if not off <= 1e-9:
        raise ContractError(
            f"{step.name}: gradients(x, h, dy) are off by {off:.2g} from autograd's, in float64"
        )


def _check_against_plain(block: nn.Module, x: Tensor | Sequence[Tensor]) -> None:
    x64 = tuple(_double(t) for t in _tuple(x))
    sequence = _doubled(ReversibleSequence(block), _tuple(x)[0].device)
    inputs = x64[0] if isinstance(x, Tensor) else x64
    found = distances(training_step(sequence, inputs), training_step(plain_twin(sequence), inputs))
    for what, off in found.items():
        if not off <= 1e-8:
            raise ContractError(
                f"{type(block).__name__}: {what} of the reversible step are off by {off:.2g} from plain autograd's, in float64"
            )


def _distance(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    pairs = [(_double(s.detach()), _double(t.detach())) for s, t in zip(a, b, strict=True)]
    error = math.sqrt(sum(float((s - t).square().sum()) for s, t in pairs))
    size = math.sqrt(sum(float(t.square().sum()) for _, t in pairs))
    return error / size if size else error


def _double(x: Tensor) -> Tensor:
    """The tensor in float64, on the CPU if its device has none."""
    return x.to(_home(x.device)).double()


def _doubled(module: M, device: torch.device) -> M:
    """A copy of a module of this device in float64, on the CPU if the device has none."""
    return copy.deepcopy(module).to(_home(device)).double()


def _home(device: torch.device) -> torch.device:
    return device if ops.widest(device) == torch.float64 else torch.device("cpu")


def _present(gradients: dict[str, Tensor | None]) -> list[Tensor]:
    return [gradient for gradient in gradients.values() if gradient is not None]


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)
