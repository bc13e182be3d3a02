"""What does each network of the paper's tables cost, side by side?

Parameters and operations are counted: two a multiply-add, one image of 1024 x 2048, 19 classes,
without auxiliary heads. Memory is predicted on fake tensors: a training step with its loss at 1024 x 2048,
batch 4 (1 for the networks in `SINGLE`), images and labels counted, parameters and their gradients not;
"plain" is the same network of PyTorch's own modules with `F.interpolate` and `F.cross_entropy`.
Time is that of a forward pass in evaluation, one image of 512 x 1024, as a ratio to VNet's next to it.

    python -m benchmarks.networks --rounds 3

With `--rounds 0` nothing is timed, and any load leaves the rest alone.
"""

import argparse
import gc
import inspect
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import record
from benchmarks.memory_levels import batch, plain_loss, using_kernels
from benchmarks.step_time import spread
from revseg.levels import MEMORY_LEVELS
from revseg.losses import UpsampleCrossEntropy
from revseg.memory import predicted_peak_bytes
from revseg.models import MODELS, create_model

QUESTION = "What does each network of the paper's tables cost, side by side?"
CLASSES = 19
MIB = 2**20
# Of the paper's table 2: parameters in millions as printed, and frames per second on its card.
PAPER: dict[str, tuple[float, float]] = {
    "pspnet": (65.7, 1.9),
    "bisenet_resnet18": (49.0, 27.0),
    "segnet": (29.5, 5.0),
    "icnet": (7.8, 30.3),
    "bisenet_xception39": (5.8, 30.0),
    "erfnet": (2.07, 17.9),
    "enet": (0.36, 22.0),
    "espnet": (0.36, 47.6),
    "vnet": (0.16, 37.4),
}
SINGLE = ("pspnet",)  # at batch 1


def counts(name: str) -> dict[str, Any]:
    """Parameters, and 10^9 operations."""
    with torch.device("meta"):
        model, images = _network(name).eval(), torch.empty(1, 3, 1024, 2048)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "gflops": round(counter.get_total_flops() / 1e9, 1)}


def peaks(name: str, size: tuple[int, int]) -> dict[str, float]:
    """MiB of a training step: plain, and at each memory level."""
    images = (1 if name in SINGLE else 4, *size)
    cases = {"plain": ("fastest", False), **{level: (level, True) for level in MEMORY_LEVELS}}
    return {
        case: round(predicted_peak_bytes(lambda level=level, on=on: _step(name, level, on, images)) / MIB)
        for case, (level, on) in cases.items()
    }


def _step(name: str, level: str, kernels: bool, size: tuple[int, int, int]) -> Callable[[], None]:
    model = _network(name, memory=level)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    loss = UpsampleCrossEntropy() if kernels else plain_loss

    def step() -> None:
        images, labels = batch(size, values=False)
        with using_kernels(kernels):
            loss(model(images), labels).backward()

    return step


def times(names: list[str], size: tuple[int, int], rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of VNet, and the ratio of each network to the VNet next to it."""
    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    vnet = _network("vnet").eval()
    found = {}
    for name in names:
        model = _network(name).eval()
        _seconds(vnet, images), _seconds(model, images)
        pairs = [(_seconds(vnet, images), _seconds(model, images)) for _ in range(rounds)]
        found[name] = {
            "vnet_ms": round(statistics.median(a for a, _ in pairs) * 1e3, 1),
            "ratio": spread([b / a for a, b in pairs]),
        }
        del model
    return found


@torch.no_grad()
def _seconds(model: nn.Module, images: torch.Tensor) -> float:
    gc.collect()
    started = time.perf_counter()
    model(images)
    return time.perf_counter() - started


def _network(name: str, **options: Any) -> nn.Module:
    heads = {"aux": False} if "aux" in inspect.signature(MODELS[name]).parameters else {}
    return create_model(name, CLASSES, **heads, **options)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    order = [*PAPER, *(name for name in MODELS if name not in PAPER)]
    parser.add_argument("--names", nargs="+", default=order, choices=order, metavar="NAME")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), metavar=("H", "W"))
    parser.add_argument("--time-size", type=int, nargs=2, default=(512, 1024), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=3, help="of timing; 0 for none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    timed = times(args.names, tuple(args.time_size), args.rounds) if args.rounds else {}
    rows = []
    for name in args.names:
        row: dict[str, Any] = {"network": name, **counts(name), "batch": 1 if name in SINGLE else 4}
        row |= {"peaks_mib": peaks(name, tuple(args.size)), "time": timed.get(name)}
        row["paper_millions"], row["paper_fps"] = PAPER.get(name, (None, None))
        rows.append(row)
        print(row, flush=True)
    settings = {"size": list(args.size), "time_size": list(args.time_size), "rounds": args.rounds}
    print("wrote", record.write("networks", QUESTION, rows, settings, args.out))


if __name__ == "__main__":
    main()
