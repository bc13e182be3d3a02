"""Runs of several processes against one process: what `test_distributed.py` starts, in a process of its own.

    python tests/training/processes.py FOLDER

The processes of a run are forked from one that has imported everything, as torchrun would start them.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from revseg.training import TrainSettings, loop, run
from revseg.training.checkpoint import load_checkpoint

SETTINGS = TrainSettings(
    size=(32, 64),
    train_samples=8,
    val_samples=3,
    batch=2,
    epochs=1,
    lr=1e-2,
    optimizer="sgd",
    model_args=("widths=4,8,16",),
    class_weights="enet",
    threads=1,
)


def start(settings: TrainSettings, size: int, spoil: Callable[[], object] | None = None) -> list[int]:
    """Forks the processes of a run; in the second step of the last one `spoil` is called."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        pid = os.fork()
        if not pid:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os._exit(child(settings, spoil if rank == 1 else None, settings.out.with_suffix(f".{rank}")))
        children.append(pid)
    return children


def child(settings: TrainSettings, spoil: Callable[[], object] | None, log: Path) -> int:
    """One process of a run; its error goes into a file."""
    real, calls = loop.gradients, []

    def gradients(*args):  # type: ignore[no-untyped-def]
        calls.append(None)
        if spoil and len(calls) == 2:
            spoil()
        return real(*args)

    loop.gradients = gradients
    try:
        run.train(settings, Console(quiet=True))
    except Exception as error:  # noqa: BLE001, whatever it is
        log.write_text(f"{type(error).__name__}: {error}")
        return int(getattr(error, "exit_code", 1))
    return 0


def fail() -> None:
    raise ValueError("this process fails")


def ended(children: list[int]) -> list[int]:
    """The exit codes, when all have ended."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def distance(one: Path, other: Path) -> dict[str, float]:
    """The largest difference of weights, relative to the change of the weights, and those of the scores."""
    a, b = (load_checkpoint(folder / "last.pt") for folder in (one, other))
    pairs = [(a["model"][name].double(), b["model"][name].double()) for name in a["model"]]
    weights = max(float((x - y).abs().max() / x.abs().max().clamp(min=1e-3)) for x, y in pairs)
    losses = [abs(a["history"][-1][key] - b["history"][-1][key]) for key in ("loss", "val_loss")]
    iou = a["history"][-1]["iou"] == b["history"][-1]["iou"]
    return {"weights": weights, "loss": losses[0], "val_loss": losses[1], "iou": iou}


def main(folder: Path) -> None:
    for name in ("write_results", "predicted_peak"):
        setattr(run, name, lambda *_: None)
    found: dict[str, object] = {}
    assert ended(start(replace(SETTINGS, batch=4, out=folder / "one"), 1)) == [0]
    for parallel in ("ddp", "fsdp"):
        settings = replace(SETTINGS, sync_bn=True, parallel=parallel, out=folder / parallel)
        found[f"{parallel} codes"] = ended(start(settings, 2))
        if parallel == "fsdp" and found["fsdp codes"] == [1, 1]:
            found["fsdp refused"] = [(folder / f"fsdp.{rank}").read_text() for rank in range(2)]
            continue
        found[f"{parallel} files"] = sorted(path.name for path in (folder / parallel).iterdir())
        found[parallel] = distance(folder / "one", folder / parallel)
        if parallel == "fsdp" and "REVSEG_SLOW" not in os.environ:
            continue  # its imports take seconds in each process
        longer = replace(settings, epochs=2, resume=True)
        found[f"{parallel} resumed"] = ended(start(longer, 2))
        found[f"{parallel} epochs"] = len(load_checkpoint(settings.out / "last.pt")["history"])

    settings = replace(SETTINGS, save_steps=1, out=folder / "dying")
    started = time.monotonic()
    found["dying codes"] = ended(start(settings, 2, spoil=fail))
    found["dying seconds"] = time.monotonic() - started
    found["messages"] = [(folder / f"dying.{rank}").read_text() for rank in range(2)]
    found["dying step"] = load_checkpoint(folder / "dying/last.pt")["step"]

    settings = replace(SETTINGS, out=folder / "stopped")
    found["stopped codes"] = ended(start(settings, 2, spoil=lambda: os.kill(os.getpid(), signal.SIGTERM)))
    found["stopped"] = [(folder / f"stopped.{rank}").read_text() for rank in range(2)]
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
