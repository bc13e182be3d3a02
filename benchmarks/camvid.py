"""Does reversible training learn what plain training learns, on real images?

Trains VNet on CamVid with the default recipe: at half size reversible and with stored
activations, from the same seed, and at full size reversible. A run that is finished already is
read, one that was cut off goes on. Results, with the log of every epoch, and a picture of the curves.

    python -m benchmarks.camvid --root CamVid

Hours on two cores. CamVid itself is not part of the project; README.md says how the folder looks.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

QUESTION = "Does reversible training learn what plain training learns, on real images?"
RUNS = {
    "camvid-180-reversible": ("--size", "180", "240", "--epochs", "20"),
    "camvid-180-saved": ("--size", "180", "240", "--epochs", "20", "--save-activations"),
    "camvid-360-reversible": ("--size", "360", "480", "--epochs", "40"),
}
KEPT = ("loss", "val_loss", "miou", "iou", "seconds")  # of an epoch's line in the log


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


def row(run: str, root: Path, folder: Path) -> dict[str, Any]:
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


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes a PNG of losses and mIoU over the epochs, all runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, scores = figure.subplots(1, 2)
    for each in rows:
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
    figure.savefig(path, format="png", dpi=120)


def label(row: dict[str, Any]) -> str:
    """As in "180 x 240 reversible"."""
    return f"{row['size'][0]} x {row['size'][1]} {row['mode']}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 5) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(RUNS), metavar="RUN", help=", ".join(RUNS))
    parser.add_argument("--root", type=Path, required=True, help="the folder of CamVid")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of the runs")
    parser.add_argument("--commit", help="of the code that made the finished runs, if it is not this one")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    if unknown := set(args.names) - set(RUNS):
        parser.error(f"unknown run {min(unknown)!r}; choose from {', '.join(RUNS)}")
    rows = []
    for name in args.names:
        commit = args.commit or record.AT_START
        if not is_finished(name, args.runs):
            finish(name, args.root, args.runs)
            commit = record.AT_START
        rows.append(row(name, args.root, args.runs) | {"commit": commit})
    print("wrote", record.write("camvid", QUESTION, rows, {"threads": 1}, args.out))
    draw(rows, args.out / "camvid.png")
    print("wrote", args.out / "camvid.png")


if __name__ == "__main__":
    main()
