"""torch.compile with a budget for activations, and without a fault of releases before torch 2.14.

There inductor, on a CPU, may forget that a map is complete only after values are scattered into it, when it makes the
loops of its reader anew to join them with the next ones. The gradient of an upsampling is such a map: what comes before
may get gradients of exactly zero, without a word, while the loss is right. Ours and the rivals' are not compiled so, but
torch.compile is to be measured as it is meant to be.

Source: pytorch issue 185509, mended by pull request 185873.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch._functorch.config as functorch


@contextmanager
def compiling(budget: float) -> Iterator[None]:
    """What is compiled inside keeps at most this share of its activations, and is right.

    Args:
        budget: The share that the partitioner may keep; 1 is its default.
    """
    with functorch.patch(activation_memory_budget=budget), _mended():
        yield


@contextmanager
def _mended() -> Iterator[None]:
    """Loops that are made anew read what the old ones read."""
    if torch.torch_version.TorchVersion(torch.__version__) >= (2, 14):
        yield
        return
    import torch._inductor.config as inductor
    from torch._inductor.scheduler import SchedulerNode  # takes seconds

    made_anew = SchedulerNode.recompute_size_and_body

    def mended(self: SchedulerNode, *args: Any, **options: Any) -> None:
        made_anew(self, *args, **options)
        self.set_read_writes(self.read_writes.rename(self.mutation_renames))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(SchedulerNode, "recompute_size_and_body", mended))
        stack.enter_context(inductor.patch(fx_graph_cache=False))  # which may hold code made before
        stack.enter_context(functorch.patch(enable_autograd_cache=False))
        yield
