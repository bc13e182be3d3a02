"""Kills a run with -9 at random points, also in the middle of writing, resumes it, and compares it with the straight run.

    python tests/training/kills.py FOLDER KILLS SEED

Runs are children of one process that has imported everything, so a kill costs a second. After each
one `last.pt`, if there is one, must be whole. A run that reaches its end is compared to the bit, then
another one is begun.
"""

import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from revseg.training import TrainSettings, checkpoint, results, run
from revseg.training.checkpoint import load_checkpoint

SETTINGS = TrainSettings(
    size=(32, 64),
    train_samples=6,
    val_samples=1,
    batch=2,
    epochs=2,
    model_args=("widths=4,8,16", "dropout=0.2"),
    threads=1,
    save_steps=1,
    keep=1,
    ema=0.9,
)


def child(settings: TrainSettings, at_write: int | None) -> int:
    """Starts a run in a process of its own, which kills itself in the middle of one of its writes, if asked to."""
    pid = os.fork()
    if pid:
        return pid
    if at_write is not None:
        die_while_writing(at_write)
    try:
        run.train(settings, Console(quiet=True))
    except Exception as error:  # noqa: BLE001, whatever it is, the child must not go on as its parent
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def die_while_writing(count: int) -> None:
    """Ends the process with -9 at the count-th of: half a checkpoint, before fsync, before and after replace."""
    points = iter(range(10**6))

    def point() -> None:
        if next(points) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    save, fsync, replace_file = torch.save, os.fsync, os.replace

    def half(state: object, part: Path) -> None:
        save(state, part)
        if next(points) == count:
            with open(part, "rb+") as file:
                file.truncate(part.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def sync(handle: int) -> None:
        point()
        fsync(handle)

    def rename(old: Path, new: Path) -> None:
        point()
        replace_file(old, new)
        point()

    checkpoint.torch.save = half
    os.fsync, os.replace = sync, rename


def same(a: object, b: object) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[arg-type]
    return a == b


def numbers(folder: Path) -> dict:
    """What of a checkpoint does not depend on the time of day."""
    state = load_checkpoint(folder / "last.pt")
    history = [
        {key: value for key, value in record.items() if key != "seconds"} for record in state["history"]
    ]
    return {"history": history} | {key: state[key] for key in ("model", "optimizer", "ema", "random", "step")}


def main(folder: Path, kills: int, seed: int) -> None:
    for name in ("write_results", "predicted_peak"):
        setattr(run, name, lambda *_: None)
    assert results
    dice = random.Random(seed)
    started = time.monotonic()
    os.waitpid(child(replace(SETTINGS, out=folder / "straight"), None), 0)
    length = time.monotonic() - started
    straight = numbers(folder / "straight")
    done = finished = 0
    while done < kills or (folder / "killed").exists():
        out = folder / "killed"
        goes_on = (out / "last.pt").exists()
        settings = replace(SETTINGS, out=out, resume=goes_on, workers=dice.choice((0, 0, 1)))
        while_writing = dice.random() < 0.5
        pid = child(settings, dice.randrange(60) if while_writing and done < kills else None)
        if done < kills and not while_writing:
            time.sleep(dice.uniform(0, length))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            done += 1
            if (out / "last.pt").exists():
                load_checkpoint(out / "last.pt")  # whole, whatever was being written
            continue
        assert os.WEXITSTATUS(status) == 0, "a resumed run failed"
        assert same(numbers(out), straight), f"differs from the straight run after {done} kills"
        finished += 1
        shutil.rmtree(out)
    print(f"{done} kills, {finished} runs finished, bitwise equal")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
