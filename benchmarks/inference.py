"""One network in evaluation, by three runtimes: PyTorch as it is, torch.compile, ONNX Runtime.

Each is timed in turn with VNet in PyTorch, in the same process with the same number of threads, and the order
changes from round to round: a ratio is that of two neighbours. torch.compile is inductor, the whole network
as one graph; its caches are new in every process, so the time of its first call is that of making the code.
ONNX Runtime runs the graph that `torch.onnx.export(dynamo=True)` gives at that size, on its CPU provider. What a
runtime gives is compared with PyTorch before it is timed: a difference above `LARGEST`, or any failure, is a
note in the place of times.

onnx, onnxscript and onnxruntime are optional: `pip install "revseg[export]"` or `python -m benchmarks.peers`.
"""

import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import process
from benchmarks.peers import EXPORT, MISSING, is_installed
from benchmarks.segmentation import network
from benchmarks.timing import in_turns, spread

LARGEST = 1e-3  # difference from PyTorch, relative to the largest logit
LIMIT = 3600  # seconds of a process
Run = Callable[[Tensor], Tensor]
Found = dict[str, dict[str, Any]]


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
        raise ModuleNotFoundError(MISSING)
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
    return all(map(is_installed, EXPORT))


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
        pairs = in_turns(partial(vnet, images), partial(run, images), rounds)
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


def in_new_process(
    name: str, size: Sequence[int], rounds: int, threads: int, runtimes: Sequence[str] = tuple(RUNTIMES)
) -> Found:
    """What `measure` finds for each runtime, in a process with its own memory and caches.

    Where a process ends before its time, the runtime that it was at gets a note, and another process goes
    on with the rest.
    """
    found: Found = {}
    while left := [runtime for runtime in runtimes if runtime not in found]:
        with tempfile.TemporaryDirectory() as caches:
            surroundings = os.environ | {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_CACHE_DIR": caches}
            job = (name, left, list(size), rounds, threads)
            values, end = process.run(_job, *job, environment=surroundings, limit=LIMIT)
        for value in values:
            found |= value
        if unfinished := [runtime for runtime in left if runtime not in found]:
            found[unfinished[0]] = {"note": end}
    return found


def _job(name: str, runtimes: list[str], size: list[int], rounds: int, threads: int) -> Iterator[Found]:
    torch.set_num_threads(threads)
    for runtime in runtimes:
        yield {runtime: measure(name, runtime, (size[0], size[1]), rounds)}


def _in_short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:197] + "..."
