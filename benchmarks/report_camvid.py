"""The section of `benchmarks/README.md` on the training runs, from `results/camvid.json`."""

from typing import Any

from benchmarks.camvid import label

Result = dict[str, Any]

HEAD = """\
## CamVid: reversible training learns what plain training learns

VNet (8-32-128) with the default recipe (Adam 5e-4, weight decay 1e-4, poly 0.9, batch 4, mirrored images,
cross-entropy without class weights) on the 367 training images, mIoU on the 101 validation images.
"saved" is the same network with ordinary autograd, from the same seed. Classes at the best epoch
of each run, in percent. The machine did other work beside, so the seconds are no comparison of speed.

![Loss and mIoU by epoch](results/camvid.png)
"""


def classes(result: Result) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: what a run took, and IoU in percent at its best epoch."""
    rows = result["rows"]
    best = [row["epochs"][row["best_epoch"] - 1] for row in rows]
    table = [
        ["best epoch, of", *(f"{row['best_epoch']}, {len(row['epochs'])}" for row in rows)],
        ["seconds an epoch", *(f"{row['seconds'] / len(row['epochs']):.1f}" for row in rows)],
        ["peak of a step, MiB", *(f"{row['peak_bytes'] / 2**20:.1f}" for row in rows)],
        ["mean IoU %, last epoch", *(f"{100 * row['epochs'][-1]['miou']:.1f}" for row in rows)],
        ["**mean IoU %, best epoch**", *(f"**{100 * epoch['miou']:.1f}**" for epoch in best)],
    ]
    for name in best[0]["iou"]:
        table.append([name, *(_percent(epoch["iou"][name]) for epoch in best)])
    return ["", *map(label, rows)], table


def comparison(result: Result) -> str:
    """How far the runs of the two modes, of one size and seed, are apart; empty if one is missing."""
    modes: dict[tuple[int, ...], dict[str, list[dict[str, Any]]]] = {}
    for row in result["rows"]:
        modes.setdefault(tuple(row["size"]), {})[row["mode"]] = row["epochs"]
    lines = []
    for size, runs in modes.items():
        if len(runs) < 2:
            continue
        pairs = list(zip(runs["reversible"], runs["saved"], strict=True))
        loss = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
        miou = [100 * (a["miou"] - b["miou"]) for a, b in pairs]
        lines.append(
            f"At {size[0]} x {size[1]} the two modes differ by at most {loss:.4f} in the training loss of an "
            f"epoch and {max(map(abs, miou)):.1f} points of mIoU, {sum(miou) / len(miou):+.2f} on average: rounding, "
            "which the first step brings in and training amplifies.\n"
        )
    return "\n".join(lines)


def commands(result: Result) -> str:
    """The command and the commit of every run."""
    return "".join(f"- `{row['command']}` at commit {row['commit'] or 'unknown'}\n" for row in result["rows"])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
