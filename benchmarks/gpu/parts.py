"""The parts of the GPU benchmark, the most important first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch

from benchmarks import record
from benchmarks.gpu import block, depth, losses, network, operations
from benchmarks.gpu.isolation import Part
from benchmarks.gpu.setup import Setup, name_of
from benchmarks.gpu.timing import bandwidth
from benchmarks.record import Row
from revseg.ops import DTYPES, KERNELS, compare


def copies(setup: Setup) -> Iterator[Row]:
    """What a copy of a large tensor moves."""
    yield {"case": "copy", "gigabytes_per_second": round(bandwidth(setup) / 1e9, 1)}


def checks(setup: Setup, dtype: torch.dtype) -> Iterator[Row]:
    """Every kernel against its reference, as `revseg doctor` does it."""
    for name, kernel in KERNELS.items():
        row: Row = {"case": "check", "kernel": name, "dtype": str(dtype).removeprefix("torch.")}
        try:
            row["live"] = kernel.is_live(kernel.example(setup.device, dtype))
            found = compare(kernel, setup.device, dtype)
            row |= {
                "right": all(each.is_right for each in found),
                "results": [each._asdict() for each in found],
            }
        except Exception as error:  # noqa: BLE001, a compiler or a driver may raise anything
            row |= {"right": False, "error": f"{type(error).__name__}: {str(error).strip()[:500]}"}
        yield row


def tests(setup: Setup) -> Iterator[Row]:
    """The tests that need a GPU, by pytest if that is installed; its plugins need not be."""
    if find_spec("pytest") is None:
        yield {"case": "tests", "note": "pytest is not installed: the checks of the kernels stand alone"}
        return
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["-m", "needs_cuda", "--continue-on-collection-errors", "-rfE", "--tb=short", "tests"]
    try:
        done = subprocess.run(
            command, cwd=record.ROOT, capture_output=True, text=True, timeout=setup.seconds_left, check=False
        )
        lines = done.stdout.strip().splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        yield {
            "case": "tests",
            "summary": lines[-1:],
            "failed": failed,
            "tail": lines[-60:] if failed else [],
        }
    except subprocess.TimeoutExpired as error:
        lines = bytes(error.stdout or b"").decode(errors="replace").splitlines()
        yield {"case": "tests", "error": "no time left", "tail": lines[-20:]}


HALF, SINGLE = torch.bfloat16, torch.float32

# Parts without times, which can run beside each other; then those that are timed, one after another.
UNTIMED: dict[str, Part] = {
    "tests": tests,
    **{f"checks {str(dtype).removeprefix('torch.')}": partial(checks, dtype=dtype) for dtype in DTYPES},
}
TIMED: dict[str, Part] = {
    "copy": copies,
    **{f"block {name_of(dtype)}": partial(block.measure, dtype=dtype) for dtype in (HALF, SINGLE)},
    **{f"losses {name_of(dtype)}": partial(losses.measure, dtype=dtype) for dtype in (HALF, SINGLE)},
    **{f"VNet {name_of(dtype)}": partial(network.measure_time, dtype=dtype) for dtype in (SINGLE, HALF)},
    **{f"memory {name_of(dtype)}": partial(network.measure_memory, dtype=dtype) for dtype in (SINGLE, HALF)},
    **{f"operations {name_of(dtype)}": partial(operations.measure, dtype=dtype) for dtype in (HALF, SINGLE)},
    "depth": depth.measure,
}
PARTS = UNTIMED | TIMED
WARMED = [name for name in TIMED if not name.startswith(("copy", "memory", "depth"))]
