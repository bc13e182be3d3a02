"""A network that a runtime runs, in the place of the network: images of any size to scores.

Preparing takes seconds, so what is prepared is kept, and there is a bound on it: a folder of photos of 500 sizes does
not make 500 sessions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from revseg.inference.export import Deployed, Run
from revseg.inference.folded import folded
from revseg.inference.runtimes import NAMES, RuntimeFailedError, check_runtime, prepared, size_of

OWN = 4  # sizes with a run of their own; the others share one for any size
Tell = Callable[[str], object]


class Runner(nn.Module):
    """A network by one runtime, in evaluation mode, for evaluation alone; its logits have no gradients.

    Each of the first `OWN` sizes of images is prepared for when its first image comes. All other sizes share one run
    for any size; where the runtime or the network has none, PyTorch runs them.

    Args:
        network: Takes images [N, 3, H, W], gives logits at its `stride`; of several outputs the first counts. It is
            copied, with batch norm folded.
        runtime: "pytorch", "compile" or "onnx".
        tell: Is told what is prepared, in a sentence.

    Raises:
        ImportError: If packages of the runtime are not installed.
        ValueError: If the runtime does not run on the device of the network.
    """

    def __init__(self, network: nn.Module, runtime: str, tell: Tell | None = None) -> None:
        super().__init__()
        check_runtime(runtime, next(network.parameters()).device)
        self.stride = int(network.stride)  # type: ignore[arg-type]
        self.plain = Deployed(folded(network), labels=False).eval()
        self.runtime, self.tell = runtime, tell or (lambda sentence: None)
        self.runs: dict[Hashable, Run] = {}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, C, h, w].

        Raises:
            RuntimeFailedError: If the runtime cannot run the network on images of this size, or gives other scores.
        """
        return self.run_of(images)(images)

    def train(self, mode: bool = True) -> Runner:
        """Stays in evaluation mode."""
        return super().train(False)

    def run_of(self, images: Tensor) -> Run:
        """What runs these images; if it is not there yet, it is prepared now."""
        if self.runtime == "pytorch":
            return self.plain
        check_runtime(self.runtime, images.device)  # they may have moved
        own, others = (images.dtype, images.shape), (images.dtype, len(images))
        for key in (own, others):
            if key in self.runs:
                return self.runs[key]
        any_size = len(self.runs) >= OWN
        try:
            run = self.prepare(images, any_size)
        except RuntimeFailedError as error:
            if not any_size:
                raise
            self.tell(f"{error}; images of further sizes are run by PyTorch")
            run = self.plain
        self.runs[others if any_size else own] = run
        return run

    def prepare(self, images: Tensor, any_size: bool) -> Run:
        """The network by the runtime, and a word about it."""
        started = time.perf_counter()
        run = prepared(self.plain.network, self.runtime, images, any_size)
        self.tell(
            f"{NAMES[self.runtime]} for images of {'any size' if any_size else size_of(images)}, "
            f"prepared in {time.perf_counter() - started:.1f} s"
        )
        return run
