"""A container for reversible blocks: one tensor in, one tensor out, no stored activations.

The two streams exist only between the doors of a `ReversibleSequence`. Outside it is a module
like any other, with the state dict of its blocks whatever its memory mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revseg.engine.chain import run_reversible
from revseg.engine.drift import Check
from revseg.engine.steps import HandedOver, Side, Step, Streams, Update, Values, run_plain
from revseg.engine.tracing import Unscriptable, has_hooks, is_traced, refuse_symbol
from revseg.exact.modes import Exact, exactness
from revseg.replay.buffers import swapped_buffers
from revseg.tensors import dense


class ReversibleSequence(Unscriptable, nn.Module):
    """Reversible blocks in a row, trained without storing their activations.

    ```python
    body = ReversibleSequence(AdditiveCoupling(f1, g1), OneSidedCoupling(f2))
    y = body(x)                  # x [N, C, ...], C even: halves along dim 1 are the streams
    y1, y2 = body((x1, x2))      # or a pair of streams, and a pair comes out
    x = body.inverse(y)
    y = body(x, context)         # side inputs: every function is called as f(x, context)
    ```

    Args:
        *blocks: Couplings, `Squeeze`, `HaarDownsample`; or one list of them.
        save_activations: True for the plain twin: ordinary autograd, the same numbers.
        exact: Bit-for-bit inversion, so that gradients are bitwise those of the plain twin. True:
            streams are rounded to multiples of 2^-12 (float32; 2^-41 in float64) and must stay
            within 4096; costs nothing to keep. "lossless": the network stays as it is, and every
            update keeps what undoing it would lose, a fifteenth to a twelfth of a stream;
            `inverse` alone has no such notes and rounds as without it.
        check: What to do when the input found in the backward pass is not that of the forward
            pass: "error", "warn", or None to skip the comparison.
        keep: How many of the last updates keep their graphs instead of being run again. Each
            costs the activations of one function and saves one run of it; the first costs no
            peak, as its graph would be built next anyway.
        per_block: Each block a call of its own, which saves its own output. Needed where something
            hooks into single blocks: FSDP2 on blocks.

    Memory: the output; and per function its buffers, the random state if it draws, and the
    residue if lossless.

    Numerics: without `exact`, gradients are those of plain autograd at the reconstructed input,
    which is off by the rounding of the inversion (`revseg.testing.inversion_bound`).
    Half-precision streams lose too much: keep streams in float32 and let the functions compute in
    bfloat16 by autocast, under which half-precision inputs are raised to float32 here. The exact
    modes need kernels that give the same bits twice: the same number of threads and the same
    settings in both passes (a change is an `InversionError`), no `torch.backends.cudnn.benchmark`
    (refused), and on a GPU deterministic kernels (`torch.use_deterministic_algorithms(True)`).
    Weights used more than once under autocast: see `revseg.exact.modes`.

    Losses: outputs have gradients, what a function puts aside has none, as it was made without a graph: a
    feature that a hook keeps, or a penalty kept as an attribute, has no `grad_fn`. Return it as channels of
    the value, compute it from an output, or set `save_activations=True`.

    Raises:
        TypeError: If a block is neither a coupling nor a reversible down-sampling.
        ValueError: If an option has none of its values.
    """

    def __init__(
        self,
        *blocks: Any,
        save_activations: bool = False,
        exact: Exact = False,
        check: Check = "error",
        keep: int = 0,
        per_block: bool = False,
    ) -> None:
        super().__init__()
        if len(blocks) == 1 and isinstance(blocks[0], (list, tuple, nn.ModuleList)):
            blocks = tuple(blocks[0])
        for i, block in enumerate(blocks):
            if not (isinstance(block, nn.Module) and hasattr(block, "steps") and hasattr(block, "inverse")):
                raise TypeError(
                    f"expected block {i} to be a Coupling, Squeeze or HaarDownsample, got {type(block).__name__}; "
                    "wrap your functions f and g as AdditiveCoupling(f, g)"
                )
        if not (isinstance(exact, bool) or exact == "lossless"):
            raise ValueError(f'expected exact to be True, False or "lossless", got {exact!r}')
        if check not in ("error", "warn", None):
            raise ValueError(f'expected check to be "error", "warn" or None, got {check!r}')
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
            raise ValueError(f"expected keep to be a number of updates, 0 or more, got {keep!r}")
        self.blocks = nn.ModuleList(blocks)
        self.save_activations = save_activations
        self.exact: Exact = exact
        self.check: Check = check
        self.keep = keep
        self.per_block = per_block
        for block in self._blocks() if exact else ():
            self._exactly(block.steps(type(block).__name__))
        self._lazy = any(is_lazy(p) for p in self.parameters())

    def forward(self, x: Tensor | Sequence[Tensor], *side: Any) -> Any:
        """The output of the last block: one tensor for one tensor, a pair for a pair.

        Args:
            x: One tensor [N, C, ...] with an even number of channels, or a pair of streams of
                one shape, dtype and device; `HandedOver`, they go as they are updated.
            *side: What every function is given besides its stream, as `f(x, *side)`: an embedding, features of
                an encoder, a mask. Tensors, also in tuples, lists and dictionaries, get their gradients and
                are kept once for the whole sequence.

        Raises:
            TypeError: If x is no floating-point tensor and no pair of them.
            ValueError: If the channels are odd or the streams differ.
        """
        join, handed = isinstance(x, Tensor), isinstance(x, HandedOver)
        streams = HandedOver(self._enter(x))
        if isinstance(x, HandedOver):
            x.clear()
        if self._lazy:
            self._materialize((streams[0], streams[1]), side)
        tensors = *streams, *Side(side).tensors
        empty = not streams[0].numel()  # nothing to save, and nothing to invert
        needed = self._needs_gradient(tensors)
        plain = self.save_activations or empty or not needed or is_traced(tensors)
        del tensors  # only those who update the streams may hold them
        if handed and not needed and not any(map(has_hooks, self._blocks())):
            return run_plain(self._steps(), streams, side)
        if plain or self.per_block:
            outputs = self._run_blocks(run_plain if plain else self._run_chain, streams.take(), side)
            return torch.cat(outputs, 1) if join else outputs
        self._refuse_hooks()
        return self._run_chain(self._steps(), streams, side, join)

    @torch.no_grad()
    def inverse(self, y: Tensor | Sequence[Tensor], *side: Any) -> Any:
        """The input that gives the output y, without gradients.

        Functions run in the mode (train or eval) the modules are in now, which has to be that of
        the forward pass. No buffer is changed: running statistics have counted this batch.

        Args:
            y: What `forward` returns: one tensor [N, C, ...], or a pair of streams.
            *side: As `forward` was given them.

        Raises:
            InversionError: If `exact=True` and a stream leaves its range.
        """
        join = isinstance(y, Tensor)
        streams = self._enter(y)
        exact = exactness(self.exact)
        for x in streams:
            exact.watch("the output", x)
        with swapped_buffers(tuple(self.modules())):
            for i, block in reversed(list(enumerate(self._blocks()))):
                for step in reversed(self._exactly(block.steps(self._name(i)))):
                    streams = step.inverse(streams, side)
                    if isinstance(step, Update):
                        exact.watch(step.name, streams[step.target])
        exact.judge()
        return torch.cat(streams, 1) if join else streams

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> nn.Module:
        return self.blocks[i]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.blocks)

    def extra_repr(self) -> str:
        return (
            f"save_activations={self.save_activations}, exact={self.exact!r}, check={self.check!r}, keep={self.keep}, "
            f"per_block={self.per_block}"
        )

    def _enter(self, x: Tensor | Sequence[Tensor]) -> Streams:
        """The streams at the door: checked, without gaps, in float32 under autocast."""
        if isinstance(x, Tensor):
            if x.ndim < 2:
                raise ValueError(f"expected a tensor [N, C, ...], got {list(x.shape)}")
            if x.shape[1] % 2:
                raise ValueError(f"expected an even number of channels, got {x.shape[1]} in {list(x.shape)}")
            x1, x2 = x.chunk(2, 1)
        elif isinstance(x, Sequence) and len(x) == 2 and all(isinstance(each, Tensor) for each in x):
            x1, x2 = x
            if (x1.shape, x1.dtype, x1.device) != (x2.shape, x2.dtype, x2.device):
                raise ValueError(
                    "expected two streams of one shape, dtype and device, got "
                    f"{list(x1.shape)} {x1.dtype} on {x1.device} and {list(x2.shape)} {x2.dtype} on {x2.device}"
                )
        else:
            refuse_symbol(x)
            kind = f"{len(x)} of them" if isinstance(x, (list, tuple)) else type(x).__name__
            raise TypeError(f"expected one tensor or a pair of tensors, got {kind}")
        if not x1.is_floating_point():
            raise TypeError(f"expected floating-point streams, got {x1.dtype}")
        if x1.element_size() < 4 and torch.is_autocast_enabled(x1.device.type):
            x1, x2 = x1.float(), x2.float()
        exact = exactness(self.exact)
        return dense(exact.enter(x1)), dense(exact.enter(x2))

    def _run_blocks(self, run: Callable[..., Streams], streams: Streams, side: Values) -> Streams:
        """The streams after all blocks, each block a call of its own."""
        for i, block in enumerate(self._blocks()):
            streams = block(*streams, *side, run=partial(self._run_block, run), name=self._name(i))
        return streams

    def _run_block(
        self, run: Callable[..., Streams], steps: list[Step], streams: Streams, side: Values
    ) -> Streams:
        return run(self._exactly(steps), streams, side)

    def _steps(self) -> list[Step]:
        """Those of all blocks."""
        return self._exactly(
            [step for i, block in enumerate(self._blocks()) for step in block.steps(self._name(i))]
        )

    def _run_chain(
        self, steps: Sequence[Step], streams: Streams | HandedOver, side: Values, join: bool = False
    ) -> Any:
        """The outputs of steps, by the engine."""
        exact = exactness(self.exact)  # of this pass alone
        return run_reversible(steps, streams, side, join, self.keep, self.check, exact)

    def _exactly(self, steps: list[Step]) -> list[Step]:
        """The steps with the rule for adding that `exact` asks for.

        Raises:
            ValueError: If a step cannot be undone bit for bit.
        """
        exact = exactness(self.exact)
        return [exact.rule(step) for step in steps]

    def _blocks(self) -> list[Any]:
        return list(self.blocks)

    def _needs_gradient(self, tensors: Sequence[Tensor]) -> bool:
        return torch.is_grad_enabled() and (
            any(x.requires_grad for x in tensors) or any(p.requires_grad for p in self.parameters())
        )

    @torch.no_grad()
    def _materialize(self, streams: Streams, side: Values) -> None:
        """Let lazy modules make their parameters, which the autograd function takes as inputs."""
        training = [(module, module.training) for module in self.modules()]
        self.eval()  # so that nothing is dropped and no statistics move
        try:
            self._run_blocks(run_plain, streams, side)
        finally:
            for module, mode in training:
                module.training = mode
        self._lazy = False

    def _name(self, i: int) -> str:
        return f"block {i} ({type(self.blocks[i]).__name__})"

    def _refuse_hooks(self) -> None:
        for i, block in enumerate(self.blocks):
            if has_hooks(block):
                raise RuntimeError(
                    f"{self._name(i)} has hooks of its own, which run only if each block is a call of its own: "
                    "set per_block=True, or put the hooks on the functions inside the block"
                )


def set_save_activations(module: nn.Module, save_activations: bool) -> None:
    """Switch every part of the module that can do without its activations to one memory mode."""
    for part in module.modules():
        if isinstance(getattr(part, "save_activations", None), bool):
            part.save_activations = save_activations  # type: ignore[assignment]
