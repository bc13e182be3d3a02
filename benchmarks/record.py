"""A result: what was measured, and all that is needed to measure it again.

Each question has one file of JSON lines: the first holds the command, the commit, the versions and the machine,
each of the others a row. `python -m benchmarks report` turns the files into tables.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import revseg
from benchmarks.peers import EXPORT, PEERS, add_peers
from revseg.files import write_text

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
Row = dict[str, Any]
Result = dict[str, Any]  # what the first line says, and "rows"


def write(
    name: str, question: str, rows: list[Row], settings: dict[str, Any], out: Path, command: str | None = None
) -> Path:
    """The file `out/name.jsonl`, with rows and settings beside the machine and versions of now.

    Args:
        name: The name of the question.
        question: What it asks, one sentence.
        rows: One dictionary a measurement.
        settings: What holds for all rows.
        out: The folder for the file.
        command: What is run without options; by default `benchmarks measure name`.
    """
    head = {
        "question": question,
        "command": " ".join(["python -m", command or f"benchmarks measure {name}", *_options()]),
        **stamp(),
        "versions": versions(),
        "machine": machine(),
        "settings": settings,
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.jsonl"
    write_text(path, "".join(json.dumps(line) + "\n" for line in (head, *rows)))
    return path


def read(path: Path) -> Result:
    """What `write` wrote."""
    head, *rows = map(json.loads, path.read_text().splitlines())
    return {**head, "rows": rows}


class Results:
    """The files of a folder, by the names of questions.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str) -> Result | None:
        """The result of a question; None if it was not measured."""
        path = self.folder / f"{name}.jsonl"
        return read(path) if path.is_file() else None


def earlier_rows(path: Path, settings: dict[str, Any], stays: Callable[[Row], bool]) -> list[Row]:
    """Those rows that stay of a file which is written again, each with commit and date; none if there is no file.

    Args:
        path: The file.
        settings: What will hold for all rows.
        stays: Whether a row is not measured again.

    Raises:
        ValueError: If they are of another machine, torch or settings, so that one table cannot hold both.
    """
    if not path.is_file():
        return []
    old = read(path)
    rows = [{name: old[name] for name in ("commit", "date")} | row for row in old["rows"] if stays(row)]
    here = _conditions({"machine": machine(), "versions": versions(), "settings": settings})
    if rows and _conditions(old) != here:
        raise ValueError(f"{path} has rows of {_conditions(old)}, not of {here}: give another --out")
    return rows


def kept_rows(path: Path, key: str, again: Sequence[str], settings: dict[str, Any]) -> dict[str, Row]:
    """`earlier_rows` by the value of a key, without those of values that are measured again."""
    return {row[key]: row for row in earlier_rows(path, settings, lambda row: row[key] not in again)}


def _conditions(result: dict[str, Any]) -> dict[str, Any]:
    found = {key: result["machine"][key] for key in ("cpu", "cores", "gpu")}
    return found | {"torch": result["versions"]["torch"]} | result["settings"]


def _options() -> list[str]:
    """Of this process, but where the file goes, which changes nothing in it."""
    options = sys.argv[1:]
    while options and not options[0].startswith("--"):  # what the command says already
        del options[0]
    return [a for i, a in enumerate(options) if a != "--out" and (i == 0 or options[i - 1] != "--out")]


def stamp() -> dict[str, str | None]:
    """Commit and date of what was measured until now."""
    now = commit()
    return {
        "commit": AT_START if now == AT_START else f"{AT_START} to {now}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """The commit of the checkout, with "+" if files were changed since; None outside of git."""
    try:
        sha = _git("rev-parse", "--short=12", "HEAD")
        # The benchmarks write results themselves: only the code that is measured makes a difference.
        changed = _git("status", "--porcelain", "--", "revseg", "kernels", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return sha + "+" * bool(changed)


def versions() -> dict[str, str | None]:
    """Versions of Python, torch, revseg and the other libraries; None for what is absent."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "revseg": revseg.__version__,
    }
    if torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
        found["triton"] = _version("triton") if find_spec("triton") else None
    add_peers()
    for peer, module in (PEERS | EXPORT).items():
        found[peer] = _version(peer) if find_spec(module) else None
    return found


def machine() -> dict[str, Any]:
    """The processor, its cores, the load, the GPU."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),  # of the last minute: ours, and that of others
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


AT_START = commit()  # of the code that is imported; by the end of a long run the checkout may have moved on
