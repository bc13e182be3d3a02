"""Is one checkout slower than another? The same steps in both, in processes that take turns.

Each round runs a step in a process of the one checkout and in one of the other, and the order changes from round to round;
a ratio is that of two neighbours, after through before. Of a process, the median of its steps counts. What is
timed is code that both checkouts understand, so neither needs this file.

    python -m benchmarks.paired PATH_BEFORE PATH_AFTER --rounds 7
    python -m benchmarks.paired PATH_BEFORE PATH_AFTER --cases "revseg Stack" --threads 2

Writes `results/paired.jsonl`: rows of question, before and after (their commits), ratio (median, quartiles, least and
greatest) and before_s. Rows of other pairs of commits, and of cases that are not named, stay. Only on a machine that does
nothing else do they mean something.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.record import Row
from benchmarks.timing import environment, spread

QUESTION = "Is one checkout slower than another?"

CHAIN = """
import torch
from benchmarks.workload import workload
step = workload({way!r}, {depth}, shape={shape}, layout=torch.{layout}).step
"""
VNET = """
import torch
from revseg.losses import UpsampleCrossEntropy
from revseg.models import create_model
torch.manual_seed(0)
model, loss = create_model("vnet", 19, memory={memory!r}), UpsampleCrossEntropy()
images = torch.randint(0, 256, (2, 3, {height}, {width}), dtype=torch.uint8)
labels = torch.randint(0, 19, (2, {height}, {width}), dtype=torch.uint8)
step = lambda: loss(model(images), labels).backward()
"""
TIMED = """
import gc, time, torch
torch.set_num_threads({threads})
{code}
for i in range({steps} + 1):
    gc.collect()
    start = time.perf_counter()
    step()
    if i:
        print("seconds", time.perf_counter() - start)
"""
LEVELS = ("fastest", "balanced", "lowest")
CHAINS = ("revseg", "revseg exact", "revseg lossless", "revseg Stack", "plain Stack")
LAST = " channels_last"
CASES = (*CHAINS, *(chain + LAST for chain in CHAINS), *(f"vnet {level}" for level in LEVELS))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paired",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, help="another")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of a process, after a first one")
    parser.add_argument("--depth", type=int, default=16, help="blocks of a chain")
    parser.add_argument("--shape", type=int, nargs=4, default=(2, 64, 128, 256), metavar=("N", "C", "H", "W"))
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("H", "W"), help="of VNet")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args(arguments)
    for path in (args.before, args.after):
        if not (path / "revseg").is_dir():
            parser.error(f"expected a checkout, a folder with revseg in it; got {path}")
    settings = {name: getattr(args, name) for name in ("rounds", "steps", "depth", "threads")}
    settings |= {"shape": list(args.shape), "size": list(args.size)}
    commits = {"before": commit(args.before), "after": commit(args.after)}
    mine = {question(case, args) for case in args.cases}
    path = args.out / "paired.jsonl"
    rows = record.earlier_rows(
        path, settings, lambda row: row["question"] not in mine or any(row[k] != commits[k] for k in commits)
    )
    for case in args.cases:
        row: Row = {"question": question(case, args), **commits}
        rows.append(row | compare(code_of(case, args), args))
        print(rows[-1], flush=True)
        path = record.write("paired", QUESTION, rows, settings, args.out, "benchmarks.paired")
    print("wrote", path)


def question(case: str, args: argparse.Namespace) -> str:
    """What the row of a case answers."""
    if case.removesuffix(LAST) in CHAINS:
        return f"step of {args.depth} blocks, {case}"
    return f"step of VNet, {case.removeprefix('vnet ')}"


def code_of(case: str, args: argparse.Namespace) -> str:
    """What defines `step`."""
    way = case.removesuffix(LAST)
    if way in CHAINS:
        layout = "channels_last" if case.endswith(LAST) else "contiguous_format"
        return CHAIN.format(way=way, depth=args.depth, shape=tuple(args.shape), layout=layout)
    height, width = args.size
    return VNET.format(memory=case.removeprefix("vnet "), height=height, width=width)


def compare(code: str, args: argparse.Namespace) -> Row:
    """The ratio of the two checkouts, and seconds of a step in the first.

    Args:
        code: Defines `step`.
        args: Of the command line.
    """
    pairs = []
    for i in range(args.rounds):
        order = (args.before, args.after) if i % 2 == 0 else (args.after, args.before)
        took = [seconds(code, checkout, args.steps, args.threads) for checkout in order]
        pairs.append((took[i % 2], took[1 - i % 2]))
    ratio = spread([after / before for before, after in pairs])
    return {"ratio": ratio, "before_s": round(statistics.median(before for before, _ in pairs), 4)}


def seconds(code: str, checkout: Path, steps: int, threads: int) -> float:
    """The median step in a process of the checkout.

    Raises:
        RuntimeError: If the process fails, with its last words.
    """
    place = environment("keeps pages", threads) | {"PYTHONPATH": str(checkout.resolve())}
    command = [sys.executable, "-W", "ignore", "-c", TIMED.format(code=code, steps=steps, threads=threads)]
    ran = subprocess.run(command, cwd=checkout, env=place, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"in {checkout}: {ran.stderr.strip()[-500:]}")
    return statistics.median(
        float(line.split()[1]) for line in ran.stdout.splitlines() if line.startswith("seconds ")
    )


def commit(checkout: Path) -> str | None:
    """Of a checkout, with "+" if the code was changed since; None outside of git."""

    def git(*words: str) -> str:
        command = ["git", *words]
        return subprocess.run(
            command, cwd=checkout, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "revseg", "kernels")
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    main()
