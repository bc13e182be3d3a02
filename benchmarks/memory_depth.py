"""How does the memory of a training step grow with depth, and with the size of the images?

The peak of one step beyond what was live at its start, and the bytes that autograd saves in the
forward pass. Both are counts of the allocator, the same on a busy machine. The step begins without gradients of
parameters, as after `optimizer.zero_grad()`; those it leaves behind are not counted.

    python -m benchmarks.memory_depth

With `--missing`, what the file has is not measured again; it must be of the same machine and torch.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.memory_plot import draw
from benchmarks.rivals import RIVALS, is_available
from benchmarks.ways import WAYS
from benchmarks.workload import SHAPE, workload
from revseg.memory import peak_bytes, saved_bytes

QUESTION = "How does the memory of a training step grow with depth, and with the size of the images?"
# On a CPU `save_on_cpu` is plain. What it keeps, and what compiled code and the rivals but FrEIA do, nobody sees.
ALL = [way for way in WAYS if way not in ("revseg keep=half", "save_on_cpu")]
HIDING = ("save_on_cpu", "compile", "compile budget 0", *(way for way in RIVALS if way != "FrEIA"))
SIZES = ((2, 64, 64, 128), (2, 64, 128, 256), (2, 64, 256, 512))  # at `DEPTH`
DEPTH = 16
# A shape and depth for which plain wants more than a machine of 24 GiB has, and those who do without.
TOO_MUCH = (4, 64, 128, 256), 128
LEAN = ("plain", "revseg", "revseg exact", "revseg Stack", "checkpoint", "memcnn", "revtorch", "revlib")
WARMED = ("compile", "compile budget 0", "revlib")  # ways whose first step takes more
LIMIT_S = 300  # of one step and what comes before it
MIB = 2**20


def measure(
    depths: Iterable[int],
    ways: Iterable[str],
    shape: tuple[int, int, int, int] = SHAPE,
    device: str = "cpu",
    limit_gib: float = 16,
) -> list[dict[str, Any]]:
    """One row for each depth and way: way, depth, shape, peak_mib, saved_mib, note.

    Args:
        depths: Numbers of blocks.
        ways: Names in `WAYS`.
        shape: N, C, H, W of the input.
        device: Where it runs.
        limit_gib: Steps whose saved tensors alone would take more are not run.
    """
    return [_row(way, depth, shape, device, limit_gib) for depth in depths for way in ways]


def _row(
    way: str, depth: int, shape: tuple[int, int, int, int], device: str, limit_gib: float
) -> dict[str, Any]:
    row: dict[str, Any] = {"way": way, "depth": depth, "shape": list(shape)}
    row |= {"peak_mib": None, "saved_mib": None, "note": ""}
    if not is_available(way):
        return row | {"note": "not installed: python -m benchmarks.peers"}
    if way not in HIDING:
        # On the meta device nothing is allocated, so that this tells whether the step can be run at all.
        row["saved_mib"] = round(
            saved_bytes(workload(way, depth, shape=shape, device="meta").forward) / MIB, 2
        )
        limit_mib = limit_gib * 1024 if device != "cpu" else min(limit_gib * 1024, _free_mib())
        if row["saved_mib"] > 0.95 * limit_mib:
            return row | {"note": f"not run: {row['saved_mib']:,.0f} MiB to save, {limit_mib:,.0f} allowed"}
    work = workload(way, depth, shape=shape, device=device)
    # On a GPU the first step also makes workspaces. On a CPU most ways have steps alike, and steps are slow.
    if device != "cpu" or way in WARMED:
        work.step()
    work.functions.zero_grad()
    peak = peak_bytes(work.step, device)
    left = sum(p.grad.nbytes for p in work.functions.parameters() if p.grad is not None)
    row["peak_mib"] = round((peak - left) / MIB, 2)
    del work
    gc.collect()
    return row


def _in_new_process(
    way: str, depth: int, shape: tuple[int, ...], device: str, limit_gib: float
) -> dict[str, Any]:
    """The row, of a process of its own: what a way leaves in memory, or that it never ends, harms no other."""
    job = json.dumps([way, depth, list(shape), device, limit_gib])
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory_depth", "--job", job]
    empty = {"way": way, "depth": depth, "shape": list(shape), "peak_mib": None, "saved_mib": None}
    try:
        ran = subprocess.run(
            command, cwd=record.ROOT, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return empty | {"note": f"not run: took more than {LIMIT_S} s"}
    if ran.returncode:
        return empty | {"note": f"not run: the process ended with {ran.returncode}"}
    row: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return row


def _free_mib() -> float:
    """The memory that new tensors may take."""
    for line in Path("/proc/meminfo").read_text().splitlines() if os.path.exists("/proc/meminfo") else []:
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 1024
    return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 32, 64, 128])
    parser.add_argument("--ways", nargs="+", default=ALL, choices=ALL, metavar="WAY", help=", ".join(ALL))
    parser.add_argument("--shape", type=int, nargs=4, default=SHAPE, metavar=("N", "C", "H", "W"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit-gib", type=float, default=16, help="steps that save more are not run")
    parser.add_argument("--depths-only", action="store_true", help="no other sizes")
    parser.add_argument("--missing", action="store_true", help="only what the file lacks")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        way, depth, shape, device, limit = json.loads(args.job)
        print(json.dumps(_row(way, depth, tuple(shape), device, limit)))
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    cases = [(tuple(args.shape), depth) for depth in args.depths]
    if not args.depths_only:
        cases += [(shape, DEPTH) for shape in SIZES if (shape, DEPTH) not in cases]
        cases.append(TOO_MUCH)
    settings = {"shape": list(args.shape), "dtype": "float32", "device": args.device, "function": "conv pair"}
    path = args.out / "memory_depth.json"
    earlier = record.earlier_rows(path, settings, lambda row: True) if args.missing else []
    found = {(*row["shape"], row["depth"], row["way"]): row for row in earlier}
    for shape, depth in cases:
        for way in args.ways if (shape, depth) != TOO_MUCH else [w for w in args.ways if w in LEAN]:
            case = (*shape, depth, way)
            if case in found and found[case]["peak_mib"] is not None:
                continue
            row = found[case] = _in_new_process(way, depth, shape, args.device, args.limit_gib)
            peak, saved = (f"{row[k] or float('nan'):10.2f}" for k in ("peak_mib", "saved_mib"))
            print(
                f"{shape} depth {depth:3}  {way:16} peak {peak} MiB  saved {saved} MiB  {row['note']}",
                flush=True,
            )
    main_shape = list(args.shape)  # first, which the picture is of
    rows = sorted(
        found.values(),
        key=lambda row: (row["shape"] != main_shape, row["shape"], row["depth"], ALL.index(row["way"])),
    )
    print("wrote", record.write("memory_depth", QUESTION, rows, settings, args.out))
    draw(rows, args.out / "memory_depth.png")


if __name__ == "__main__":
    main()
