"""Does a run of the training program end as it should, with every option on and cut off in the middle?

Two runs of `revseg train`, small ones: on CamVid with every option that can be combined, and on generated scenes with
the defaults. Each is stopped by SIGTERM in its second epoch, as a scheduler would, and goes on by `--resume`. The one on
generated scenes is also made without a stop: the two end with the same weights, to the bit, or it is a complaint.

    python -m benchmarks measure training_runs --root CamVid

Minutes on a core. CamVid itself is not part of the project; benchmarks/README.md says how the folder looks.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import picture
from benchmarks.record import Result, Results, Row
from benchmarks.tables import Table, markdown, source
from revseg.training.checkpoint import load_checkpoint

QUESTION = (
    "Does a run of the training program end as it should, with every option on and cut off in the middle?"
)
ORDER = 13.2
ASKED_ALONE = True  # it needs the images of CamVid
CAMVID = (
    "--data camvid --epochs 3 --batch 4 --accumulate 2 --scale 0.75 2 --crop 360 480 --crop-classes 2 6 9 --photometric strong "
    "--memory fastest --lossless --compile --channels-last --precision bfloat16 --loss ohem --class-weights erfnet "
    "--label-smoothing 0.05 --optimizer adamw --lr 2e-3 --weight-decay 2e-4 --schedule cosine --warmup 10 --clip 5 --ema 0.95 "
    "--workers 1 --save-steps 10 --keep 2 --pictures 3"
)
SCENES = (
    "--data synthetic --size 128 256 --train-samples 96 --val-samples 24 --epochs 6 --lr 2e-3 --save-steps 5"
)
RUNS = {"camvid": CAMVID, "scenes": SCENES}
MADE_TWICE = ("scenes",)  # also without a stop
KEPT = ("loss", "val_loss", "miou", "iou", "seconds")  # of an epoch's line in the log
LIMIT = 7200  # seconds of a run


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", nargs="+", default=list(RUNS), choices=list(RUNS), metavar="RUN")
    parser.add_argument("--root", type=Path, help="the folder of CamVid")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of the runs")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"threads": 1}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    rows: list[Row] = []
    for name in args.names:
        words = flags(name, args.root)
        out = args.runs / name
        stopped = cut_off(words, out)
        resumed = revseg([*words, "--out", str(out), "--resume"]).wait(LIMIT)
        row = {"run": name, "command": shlex.join(["revseg", *words])} | stopped | {"resumed_code": resumed}
        rows.append(row | (what_it_left(out) if resumed == 0 else {}))
        if name in MADE_TWICE:
            straight = args.runs / f"{name}-straight"
            revseg([*words, "--out", str(straight), "--overwrite"]).wait(LIMIT)
            rows[-1]["same_as_straight"] = same_weights(out, straight)
        yield rows


def complaints(rows: list[Row]) -> list[str]:
    return [
        f"{row['run']}: ended with {row['code']}, then {row['resumed_code']}"
        for row in rows
        if (row["code"], row["resumed_code"]) != (128 + signal.SIGTERM, 0)
    ] + [
        f"{row['run']}: other weights than without the stop"
        for row in rows
        if not row.get("same_as_straight", True)
    ]


def flags(name: str, root: Path | None) -> list[str]:
    """The words of a run after `revseg`, but for its folder.

    Raises:
        SystemExit: If the folder of CamVid is needed and was not given.
    """
    words = ["train", *RUNS[name].split(), "--threads", "1"]
    if name != "camvid":
        return words
    if root is None:
        raise SystemExit(
            "the run on CamVid needs --root, the folder of its images; or leave it out: --names scenes"
        )
    return [*words, "--root", str(root)]


def revseg(words: list[str]) -> "subprocess.Popen[bytes]":
    """A command in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "revseg", *words])


def cut_off(words: list[str], out: Path) -> Row:
    """Begins a run anew and stops it by SIGTERM at the first checkpoint in its second epoch: its code, epoch and step then."""
    process = revseg([*words, "--out", str(out), "--overwrite"])
    begun = time.time()
    while process.poll() is None and not in_second_epoch(out, begun):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code = process.wait(LIMIT)
    state = load_checkpoint(out / "last.pt")
    return {"code": code, "epoch": len(state["history"]) + 1, "step": state["step"]}


def in_second_epoch(out: Path, begun: float) -> bool:
    """Whether the run has a line in its log, and then wrote a checkpoint."""
    log, saved = out / "log.jsonl", out / "last.pt"
    if not (log.is_file() and saved.is_file() and log.stat().st_mtime > begun):
        return False
    return bool(log.read_text()) and saved.stat().st_mtime > log.stat().st_mtime


def what_it_left(out: Path) -> Row:
    """Every epoch, the peak of a step measured and predicted, and sizes, from the files of a finished run."""
    summary = json.loads((out / "summary.json").read_text())
    epochs = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {
        "parameters": summary["parameters"],
        "peak_bytes": summary["peak_bytes"],
        "predicted_peak_bytes": summary.get("predicted_peak_bytes", {}),
        "best_epoch": summary["best"]["epoch"],
        "epochs": [{key: _rounded(each[key]) for key in KEPT} for each in epochs],
    }


def same_weights(out: Path, straight: Path) -> bool:
    """Whether two runs ended with the same weights and moments, to the bit."""
    one, other = (load_checkpoint(folder / "last.pt") for folder in (out, straight))
    weights = all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    return weights and one["history"][-1]["loss"] == other["history"][-1]["loss"]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 5) if isinstance(value, float) else value


HEAD = """\
## Runs of the training program, cut off and resumed

`revseg train` on CamVid (360 x 480) with every option on that can be combined, 3 epochs, and on generated scenes, 6 epochs: too
short to say what the networks can learn. Each was stopped by SIGTERM in its second epoch and went on by `--resume`. Other
programs ran beside them: their seconds say nothing.

![Loss and mIoU by epoch](results/training_runs.png)
"""


def sections(results: Results) -> list[str]:
    result = results.get("training_runs")
    if not result:
        return []
    commands = "".join(f"- {row['run']}: `{row['command']}`\n" for row in result["rows"])
    return [HEAD, markdown(table(result)), commands, source(result)]


def table(result: Result) -> Table:
    """A run a row: where it was stopped, what it came to, peaks of a step."""
    lines = []
    for row in result["rows"]:
        last, same = row["epochs"][-1], row.get("same_as_straight")
        peaks = [
            f"{row['peak_bytes'].get(mode, 0) / 2**20:.1f} ({row['predicted_peak_bytes'].get(mode, 0) / 2**20:.1f})"
            for mode in ("reversible", "saved")
        ]
        lines.append(
            [
                row["run"],
                f"epoch {row['epoch']}, step {row['step']}",
                str(row["code"]),
                {True: "yes, to the bit", False: "no", None: "not made"}[same],
                f"{last['loss']:.3f}",
                f"{100 * last['miou']:.1f}",
                *peaks,
            ]
        )
    head = ["run", "stopped at", "code", "as without a stop", "loss at the end", "mIoU %"]
    return [*head, "peak of a step, MiB (predicted)", "activations stored, MiB (predicted)"], lines


def draw(result: Result, path: Path) -> None:
    """Losses and mIoU over the epochs."""
    figure, (losses, scores) = picture.panels(2, 4.5, 3.4)
    for row, colour in zip(result["rows"], ("tab:orange", "tab:blue"), strict=False):
        numbers = range(1, len(row["epochs"]) + 1)
        losses.plot(
            numbers, [e["loss"] for e in row["epochs"]], ".-", color=colour, label=f"{row['run']}, training"
        )
        losses.plot(numbers, [e["val_loss"] for e in row["epochs"]], ".--", color=colour, label="validation")
        scores.plot(numbers, [100 * e["miou"] for e in row["epochs"]], ".-", color=colour, label=row["run"])
    losses.set(title="loss", xlabel="epoch", ylim=(0, None))
    scores.set(title="validation", xlabel="epoch", ylabel="mean IoU, %", ylim=(0, None))
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        axes.legend()
        axes.xaxis.get_major_locator().set_params(integer=True)
    picture.save(figure, path)
