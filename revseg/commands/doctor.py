"""`revseg doctor`: what is installed here, which kernels run, and whether they are right.

Every operation runs on this device beside plain PyTorch, in its own dtype and in float64. What a
driver, a compiler or a card gets wrong shows here, before a training run is lost to it.
"""

import importlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import numpy
import torch
from rich.console import Console
from rich.table import Table

from revseg import __version__
from revseg.kernels.dispatch import DTYPES, has_triton, is_interpreting, kernels_are_on
from revseg.kernels.registry import KERNELS
from revseg.kernels.verify import Comparison, Kernel, compare
from revseg.training.settings import DoctorSettings
from revseg.training.setup import choose_device


class WrongKernelError(RuntimeError):
    """An operation whose results on this device are not those of its reference."""


@dataclass(frozen=True)
class Finding:
    """What was found out about one kernel in one dtype."""

    kernel: str
    dtype: str
    runs_as: str  # "Triton", "interpreter" or "PyTorch"
    comparisons: list[Comparison]
    failure: str  # why it could not be compared; empty if it could

    @property
    def is_right(self) -> bool:
        return not self.failure and all(each.is_right for each in self.comparisons)

    @property
    def worst(self) -> Comparison:
        """The result that is nearest to its bound, or furthest beyond it."""
        return max(self.comparisons, key=lambda each: each.error / each.bound if each.bound else each.error)


def doctor(settings: DoctorSettings) -> None:
    """Prints a table of the kernels, then what a report needs: versions, settings, what is wrong.

    Args:
        settings: What the command line says.

    Raises:
        ValueError: If there is no such device.
        WrongKernelError: If an operation failed, or was off by more than its bound.
    """
    device = choose_device(settings.device)
    console = Console(highlight=False)
    findings = examine(KERNELS, device)
    console.print(findings_table(findings))
    wrong = [f"{f.kernel} in {f.dtype}" for f in findings if not f.is_right]
    console.print("\nFor a report, paste this:\n\n```text")
    console.print(installation_table(installation(device)))
    for f in findings:
        if f.failure:
            console.print(f"{f.kernel} in {f.dtype}: {f.failure}", markup=False, soft_wrap=True)
    console.print(f"{len(findings) - len(wrong)} of {len(findings)} right\n```")
    if wrong:
        raise WrongKernelError(
            f"not right on {device}: {', '.join(wrong)}; REVSEG_KERNELS=0 in the environment trains without"
        )


def installation(device: torch.device) -> dict[str, str]:
    """Versions, device and settings, as a user would report them."""
    found = {
        "revseg": __version__,
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "torch": torch.__version__,
        "triton": triton_version(),
        "device": device_name(device),
        "REVSEG_KERNELS": os.environ.get("REVSEG_KERNELS", "not set"),
        "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET", "not set"),
    }
    if not kernels_are_on():
        found["REVSEG_KERNELS"] += ": layers run as ordinary PyTorch modules"
    return found


def triton_version() -> str:
    """The version of Triton, or in words what is used without it."""
    if not has_triton():
        return "no Triton: the PyTorch path is used"
    try:
        return str(importlib.import_module("triton").__version__)
    except Exception as error:  # noqa: BLE001, whatever a broken installation raises
        return f"cannot be imported: {_line(error)}"


def device_name(device: torch.device) -> str:
    """The device in words: of a GPU its name, compute capability and driver's CUDA or ROCm version."""
    if device.type != "cuda":
        return f"{device}, {torch.get_num_threads()} threads"
    major, minor = torch.cuda.get_device_capability(device)
    toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{device}, {torch.cuda.get_device_name(device)}, compute capability {major}.{minor}, {toolkit}"


def examine(kernels: Mapping[str, Kernel], device: torch.device) -> list[Finding]:
    """One finding for each kernel in each dtype; what goes wrong in one does not touch the next."""
    findings = []
    for name, kernel in kernels.items():
        for dtype in DTYPES:
            kind, comparisons, failure = "PyTorch", list[Comparison](), ""
            try:
                kind = runs_as(kernel, device, dtype)
                comparisons = compare(kernel, device, dtype)
            except Exception as error:  # noqa: BLE001, a compiler or a driver may raise anything
                failure = _line(error)
            findings.append(Finding(name, str(dtype).removeprefix("torch."), kind, comparisons, failure))
    return findings


def runs_as(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str:
    """What the kernel's example runs as: "Triton", "interpreter" or "PyTorch"."""
    if not kernel.is_live(kernel.example(device, dtype)):
        return "PyTorch"
    return "interpreter" if is_interpreting() else "Triton"


def installation_table(found: Mapping[str, str]) -> Table:
    """Names and values, without lines."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in found.items():
        table.add_row(name, value)
    return table


def findings_table(findings: list[Finding]) -> Table:
    """A line for each finding: its result nearest to the bound, its error and the bound."""
    title = "Errors against float64; right is at most twice the error of plain PyTorch"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("kernel", "dtype", "runs as", "result", "error", "bound", ""):
        table.add_column(name, justify="right" if name in ("error", "bound") else "left", no_wrap=True)
    for f in findings:
        if f.failure:
            cells = ("", "", "", "[red]failed[/red]")
        else:
            mark = "right" if f.is_right else "[red]wrong[/red]"
            cells = (f.worst.result, f"{f.worst.error:.1e}", f"{f.worst.bound:.1e}", mark)
        table.add_row(f.kernel, f.dtype, f.runs_as, *cells)
    return table


def _line(error: Exception) -> str:
    """The error on one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
