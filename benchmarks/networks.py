"""What does each network of the paper's tables cost, side by side?

Parameters and operations are counted: two a multiply-add, one image of 1024 x 2048, 19 classes, without auxiliary
heads. Time is that of one image in evaluation by three runtimes (`benchmarks.inference`), 512 x 1024 if
nothing else is said, as frames per second and as a ratio to VNet in PyTorch next to it. What training takes
in memory is asked by `benchmarks.training_memory`.

    python -m benchmarks.networks --rounds 5
    python -m benchmarks.networks --names vnet enet

The second measures two networks again and keeps the rows of the others. The file is written after each
network. With `--rounds 0` nothing is timed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import record
from benchmarks.inference import RUNTIMES, in_new_process, network
from revseg.models import MODELS

QUESTION = "What does each network of the paper's tables cost, side by side?"
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


def counts(name: str) -> dict[str, Any]:
    """Parameters, and 10^9 operations."""
    with torch.device("meta"):
        model, images = network(name).eval(), torch.empty(1, 3, 1024, 2048)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "gflops": round(counter.get_total_flops() / 1e9, 1)}


def kept_rows(path: Path, names: Sequence[str], settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`record.earlier_rows`, by network, without those of `names`, which are measured again."""
    rows = record.earlier_rows(path, settings, lambda row: row["network"] not in names)
    return {row["network"]: row for row in rows}


def measure(name: str, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    """The row of one network.

    Args:
        name: The network.
        rounds: How often it is timed by each runtime; 0 for not at all.
        options: Of `benchmarks.inference.in_new_process`.
    """
    row: dict[str, Any] = {"network": name, **counts(name)}
    row |= {"rounds": rounds, "inference": in_new_process(name, rounds=rounds, **options) if rounds else {}}
    row["paper_millions"], row["paper_fps"] = PAPER.get(name, (None, None))
    return row | record.stamp()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    order = [*PAPER, *(name for name in MODELS if name not in PAPER)]
    parser.add_argument("--names", nargs="+", default=order, choices=order, metavar="NAME")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 for none")
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = {"size": list(args.size), "threads": args.threads}
    options = {"size": args.size, "threads": args.threads, "runtimes": args.runtimes}
    rows = kept_rows(args.out / "networks.json", args.names, settings)
    for name in args.names:
        rows[name] = measure(name, args.rounds, options)
        print(rows[name], flush=True)
        in_order = [rows[each] for each in order if each in rows]
        path = record.write("networks", QUESTION, in_order, settings, args.out)
    print("wrote", path)


if __name__ == "__main__":
    main()
