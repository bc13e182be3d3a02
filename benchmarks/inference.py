"""One network in evaluation, by three runtimes: PyTorch as it is, torch.compile, ONNX Runtime.

Each is timed in turn with VNet in PyTorch, in the same process with the same number of threads, and the order
changes from round to round: a ratio is that of two neighbours. torch.compile is inductor, the whole network
as one graph; its caches are new in every process, so the time of its first call is that of making the code.
ONNX Runtime runs the graph that `torch.onnx.export(dynamo=True)` gives at that size, on its CPU provider. What a
runtime gives is compared with PyTorch before it is timed: a difference above `LARGEST`, or any failure, is a
note in the place of times.

onnx, onnxscript and onnxruntime are optional: `pip install "revseg[export]"` or `python -m benchmarks.peers`.

    python -m benchmarks.inference vnet --size 512 1024
"""

import argparse
import gc
import inspect
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.rivals import add_peers
from benchmarks.step_time import spread
from revseg.models import MODELS, create_model

CLASSES = 19
LARGEST = 1e-3  # difference from PyTorch, relative to the largest logit
LIMIT = 3600  # seconds of a process
Run = Callable[[Tensor], Tensor]
Found = dict[str, dict[str, Any]]


def network(name: str, **options: Any) -> nn.Module:
    """The network for 19 classes, without auxiliary heads."""
    heads = {"aux": False} if "aux" in inspect.signature(MODELS[name]).parameters else {}
    return create_model(name, CLASSES, **heads, **options)


def eager(model: nn.Module, images: Tensor) -> Run:
    """The network itself."""
    return model


def compiled(model: nn.Module, images: Tensor) -> Run:
    """By torch.compile; the code is made by the first call."""
    run: Run = torch.compile(model, fullgraph=True)
    return run


def onnx(model: nn.Module, images: Tensor) -> Run:
    """By ONNX Runtime, from a graph for images of this size."""
    if not has_onnx():
        raise ModuleNotFoundError("not installed: python -m benchmarks.peers")
    import onnxruntime  # type: ignore[import-not-found]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export(model, images, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {source.name: x.numpy()})[0])


def has_onnx() -> bool:
    """Whether ONNX, its exporter and its runtime are here; they are optional."""
    add_peers()
    return all(map(find_spec, record.EXPORT))


def export(model: nn.Module, images: Tensor, path: Path) -> None:
    """The network as an ONNX file for images of this size."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about its own code
        torch.onnx.export(model, (images,), path, dynamo=True, verbose=False)


RUNTIMES: dict[str, Callable[[nn.Module, Tensor], Run]] = {"eager": eager, "onnx": onnx, "compile": compiled}


@torch.no_grad()
def measure(name: str, runtime: str, size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """The times of one network by one runtime.

    Args:
        name: The network.
        runtime: A name in `RUNTIMES`.
        size: H, W of the one image.
        rounds: How often it is timed, after a warm-up.

    Returns:
        prepare_s (seconds until the first result), difference (the greatest from PyTorch, relative to the
        largest logit), ms (median), fps, vnet_ms (of the neighbours), ratio (median, quartiles, least and
        greatest); or note, what failed.
    """
    torch.manual_seed(0)
    model, vnet = network(name).eval(), network("vnet").eval()
    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    expected = model(images)
    found: dict[str, Any] = {}
    try:
        started = time.perf_counter()
        run = RUNTIMES[runtime](model, images)
        logits = run(images)
        found["prepare_s"] = round(time.perf_counter() - started, 2)
        found["difference"] = difference(logits, expected)
        if not found["difference"] <= LARGEST:
            return found | {"note": f"off by {found['difference']:.1g} of the largest logit"}
        vnet(images)
        pairs = []
        for i in range(rounds):
            order = [vnet, run] if i % 2 == 0 else [run, vnet]
            seconds = {each: _seconds(each, images) for each in order}
            pairs.append((seconds[vnet], seconds[run]))
    except Exception as error:  # noqa: BLE001, a compiler or a runtime may raise anything
        return found | {"note": _in_short(f"{type(error).__name__}: {error}")}
    middle = statistics.median(b for _, b in pairs)
    return found | {
        "ms": round(1e3 * middle, 2),
        "fps": round(1 / middle, 2),
        "vnet_ms": round(1e3 * statistics.median(a for a, _ in pairs), 2),
        "ratio": spread([b / a for a, b in pairs]),
    }


def difference(logits: Tensor, expected: Tensor) -> float:
    """The greatest difference, relative to the largest logit; NaN if one is not finite."""
    return float(f"{((logits - expected).abs().amax() / expected.abs().amax()).item():.2g}")


def _seconds(run: Run, images: Tensor) -> float:
    gc.collect()
    started = time.perf_counter()
    run(images)
    return time.perf_counter() - started


def in_new_process(
    name: str, size: Sequence[int], rounds: int, threads: int, runtimes: Sequence[str] = tuple(RUNTIMES)
) -> Found:
    """What `measure` finds for each runtime, in a process with its own memory and caches.

    Where a process ends before its time, the runtime that it was at gets a note, and another process goes
    on with the rest.
    """
    found: Found = {}
    while left := [runtime for runtime in runtimes if runtime not in found]:
        lines, end = _process(name, size, rounds, threads, left)
        for line in lines:
            found |= json.loads(line)
        if unfinished := [runtime for runtime in left if runtime not in found]:
            found[unfinished[0]] = {"note": end}
    return found


def _process(
    name: str, size: Sequence[int], rounds: int, threads: int, runtimes: Sequence[str]
) -> tuple[list[str], str]:
    """The lines that a process printed, and how it ended."""
    command = [sys.executable, "-m", "benchmarks.inference", name, "--runtimes", *runtimes]
    command += ["--size", *map(str, size), "--rounds", str(rounds), "--threads", str(threads)]
    with tempfile.TemporaryDirectory() as caches:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": caches}
        process = subprocess.Popen(
            command, env=environment, cwd=record.ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            out, _ = process.communicate(timeout=LIMIT)
            end = f"the process ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            end = f"not done after {LIMIT} s"
    return [line for line in out.splitlines() if line.startswith("{")], end


def _in_short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:197] + "..."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=list(MODELS), metavar="NAME")
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for runtime in args.runtimes:
        print(json.dumps({runtime: measure(args.name, runtime, tuple(args.size), args.rounds)}), flush=True)


if __name__ == "__main__":
    main()
