"""Does reversible training learn what plain training learns, on real images?

Trains VNet on CamVid with the default recipe: at half size reversible and with stored
activations, from the same seed, and at full size reversible. A run that is finished already is
read, one that was cut off goes on. Results, with the log of every epoch, and a picture of the curves.

    python -m benchmarks measure camvid --root CamVid

Hours on two cores. CamVid itself is not part of the project; README.md says how the folder looks.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import picture, record
from benchmarks.record import Result, Results, Row
from benchmarks.tables import Table, markdown, source

QUESTION = "Does reversible training learn what plain training learns, on real images?"
ORDER = 13
ASKED_ALONE = True  # it needs the images, and hours
RUNS = {
    "camvid-180-reversible": ("--size", "180", "240", "--epochs", "20"),
    "camvid-180-saved": ("--size", "180", "240", "--epochs", "20", "--save-activations"),
    "camvid-360-reversible": ("--size", "360", "480", "--epochs", "40"),
}
KEPT = ("loss", "val_loss", "miou", "iou", "seconds")  # of an epoch's line in the log


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", nargs="+", default=list(RUNS), choices=list(RUNS), metavar="RUN")
    parser.add_argument("--root", type=Path, required=True, help="the folder of CamVid")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of the runs")
    parser.add_argument("--commit", help="of the code that made the finished runs, if it is not this one")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"threads": 1}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    rows: list[Row] = []
    for name in args.names:
        commit = args.commit or record.AT_START
        if not is_finished(name, args.runs):
            finish(name, args.root, args.runs)
            commit = record.AT_START
        rows.append(row_of(name, args.root, args.runs) | {"commit": commit})
        yield rows


def flags(run: str, root: Path, folder: Path) -> list[str]:
    """The command of a run, after `revseg`."""
    where = ["--data", "camvid", "--root", str(root), "--out", str(folder / run)]
    return ["train", *where, "--threads", "1", "--decay", "all", *RUNS[run]]


def finish(run: str, root: Path, folder: Path) -> None:
    """Train from the start, or on from where the run was cut off."""
    resume = ["--resume"] if (folder / run / "last.pt").is_file() else []
    subprocess.run([sys.executable, "-m", "revseg", *flags(run, root, folder), *resume], check=True)


def is_finished(run: str, folder: Path) -> bool:
    return (folder / run / "summary.json").is_file()


def row_of(run: str, root: Path, folder: Path) -> Row:
    """What a finished run says: command, settings, every epoch, peak bytes of a step, versions."""
    summary = json.loads((folder / run / "summary.json").read_text())
    log = [json.loads(line) for line in (folder / run / "log.jsonl").read_text().splitlines()]
    settings = {key: value for key, value in summary["settings"].items() if key != "out"}
    mode = "saved" if settings["save_activations"] else "reversible"
    return {
        "run": run,
        "command": shlex.join(["revseg", *flags(run, root, folder)]),
        "mode": mode,
        "size": settings["size"],
        "settings": settings,
        "parameters": summary["parameters"],
        "peak_bytes": summary["peak_bytes"][mode],
        "seconds": summary["seconds"],
        "torch": summary["torch"],
        "device": summary["device"],
        "best_epoch": summary["best"]["epoch"],
        "epochs": [{key: _rounded(each[key]) for key in KEPT} for each in log],
    }


def draw(result: Result, path: Path) -> None:
    """Losses and mIoU over the epochs, all runs."""
    from matplotlib.lines import Line2D

    figure, (losses, scores) = picture.panels(2, 5.5, 4.6)
    for each in result["rows"]:
        # The saved run is where the reversible one of its size is: circles on its line.
        style: dict[str, Any] = {"color": "tab:blue" if each["size"][0] < 360 else "tab:orange"}
        circles = {"linestyle": "none", "marker": "o", "markersize": 6, "markerfacecolor": "none"}
        line, dashes = [circles] * 2 if each["mode"] == "saved" else [{"linestyle": "-"}, {"linestyle": "--"}]
        epochs = range(1, len(each["epochs"]) + 1)
        losses.plot(epochs, [e["loss"] for e in each["epochs"]], **style, **line)
        losses.plot(epochs, [e["val_loss"] for e in each["epochs"]], **style, **dashes)
        scores.plot(epochs, [100 * e["miou"] for e in each["epochs"]], label=label(each), **style, **line)
    kinds = [
        Line2D([], [], color="0.3", linestyle=s, label=t)
        for s, t in (("-", "training"), ("--", "validation"))
    ]
    losses.legend(handles=kinds)
    losses.set(title="cross-entropy", xlabel="epoch", ylabel="loss", ylim=(0, None))
    scores.legend(loc="lower right")
    scores.set(title="CamVid validation", xlabel="epoch", ylabel="mean IoU of 11 classes, %", ylim=(0, None))
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        axes.set_xlim(0, None)
        axes.xaxis.get_major_locator().set_params(integer=True)
    picture.save(figure, path)


def label(row: dict[str, Any]) -> str:
    """As in "180 x 240 reversible"."""
    return f"{row['size'][0]} x {row['size'][1]} {row['mode']}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 5) if isinstance(value, float) else value


HEAD = """\
## CamVid: reversible training learns what plain training learns

VNet (8-32-128) with the default recipe (Adam 5e-4, weight decay 1e-4, poly 0.9, batch 4, mirrored images,
cross-entropy without class weights) on the 367 training images, mIoU on the 101 validation images.
"saved" is the same network with ordinary autograd, from the same seed. Classes at the best epoch
of each run, in percent. The machine did other work beside, so the seconds are no comparison of speed.

![Loss and mIoU by epoch](results/camvid.png)
"""


def sections(results: Results) -> list[str]:
    result = results.get("camvid")
    if not result:
        return []
    return [HEAD, markdown(table(result)), comparison(result), commands(result), source(result)]


def table(result: Result) -> Table:
    """Head and rows of the table: what a run took, and IoU in percent at its best epoch."""
    rows = result["rows"]
    best = [row["epochs"][row["best_epoch"] - 1] for row in rows]
    lines = [
        ["best epoch, of", *(f"{row['best_epoch']}, {len(row['epochs'])}" for row in rows)],
        ["seconds an epoch", *(f"{row['seconds'] / len(row['epochs']):.1f}" for row in rows)],
        ["peak of a step, MiB", *(f"{row['peak_bytes'] / 2**20:.1f}" for row in rows)],
        ["mean IoU %, last epoch", *(f"{100 * row['epochs'][-1]['miou']:.1f}" for row in rows)],
        ["**mean IoU %, best epoch**", *(f"**{100 * epoch['miou']:.1f}**" for epoch in best)],
    ]
    for name in best[0]["iou"]:
        lines.append([name, *(_percent(epoch["iou"][name]) for epoch in best)])
    return ["", *map(label, rows)], lines


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
