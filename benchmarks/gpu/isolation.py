"""A part in a process of its own, so that a fault of the GPU, a hang or a crash ends with it.

Rows go to a file as they are found: those of a part that does not come to its end are kept.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from benchmarks.gpu.setup import Setup
from benchmarks.record import Row

Part = Callable[[Setup], Iterator[Row]]

# A server that has imported torch and not touched the GPU; a part begins as its copy, without waiting.
CONTEXT = get_context("forkserver")


class Running:
    """A part that runs.

    Args:
        name: What its rows say.
        part: What it does.
        setup: What it is told.
        folder: Where its rows go.
    """

    def __init__(self, name: str, part: Part, setup: Setup, folder: Path) -> None:
        self.name, self.setup = name, setup
        self.path = folder / f"{name}{' warm' if setup.warm else ''}.jsonl"
        self.path.touch()
        self.process: BaseProcess = CONTEXT.Process(target=_run, args=(part, setup, str(self.path)))
        self.started = time.time()
        self.process.start()

    def rows(self, grace: float = 10.0) -> list[Row]:
        """The rows, when the part has ended or its time is over; the last one says what went wrong, if anything did.

        Args:
            grace: Seconds beyond its deadline after which it is killed.
        """
        self.process.join(max(1.0, self.setup.seconds_left + grace))
        error = None
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            error = f"killed after {time.time() - self.started:.0f} s"
        elif self.process.exitcode:
            error = f"ended with exit code {self.process.exitcode}"
        rows = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
        return [{"part": self.name, **row} for row in [*rows, *([{"error": error}] if error else [])]]


def _run(part: Part, setup: Setup, path: str) -> None:
    if setup.toy:
        torch.set_num_threads(1)  # with toys other threads only wait
    with Path(path).open("a") as file:
        try:
            for row in part(setup):
                file.write(json.dumps(row) + "\n")
                file.flush()
        except Exception as error:  # noqa: BLE001, it is what was found
            where = traceback.format_exc().strip().splitlines()[-3:]
            row = {"error": f"{type(error).__name__}: {str(error).strip()[:500]}", "where": where}
            file.write(json.dumps(row) + "\n")
