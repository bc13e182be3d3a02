"""Is the predicted peak of a training step the measured one, for every network and memory level?

Both by torch's own count: the allocator's events, and blocks of fake tensors (`revseg.memory.predict`). "plain" is
the network of ordinary PyTorch modules. Counted is what a step takes beyond parameters, images and labels.

    python -m benchmarks measure prediction
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.record import Results, Row
from benchmarks.segmentation import CLASSES, MIB, batch, using_kernels
from benchmarks.tables import Table, markdown, size, source
from revseg.losses import UpsampleCrossEntropy
from revseg.memory import peak_bytes, predict
from revseg.models import create_model, list_models

QUESTION = "Is the predicted peak of a training step the measured one, for every network and memory level?"
ORDER = 14
WAYS = ("plain", "fastest", "balanced", "lowest")
DTYPES = ("float32", "bfloat16")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", default=list_models(), choices=list_models(), metavar="NAME")
    parser.add_argument("--size", type=int, nargs=3, default=(2, 192, 384), metavar=("N", "H", "W"))
    parser.add_argument("--threads", type=int, default=1)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"size": list(args.size)}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    for name in args.networks:
        for way in WAYS:
            for dtype in DTYPES:
                rows.append(row_of(name, way, dtype, tuple(args.size)))
                print(rows[-1], flush=True)
                yield rows


def row_of(name: str, way: str, dtype: str, size: tuple[int, int, int]) -> Row:
    """Both peaks of one step."""
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model = create_model(name, CLASSES, memory="fastest" if way == "plain" else way)
    finally:
        torch.set_default_dtype(torch.float32)
    images, labels = batch(size, values=True)
    loss = UpsampleCrossEntropy()

    def step(model: nn.Module) -> None:
        loss(model(images), labels).backward()
        model.zero_grad(set_to_none=True)

    row: Row = {"network": name, "way": way, "dtype": dtype}
    with using_kernels(way != "plain"):
        row["predicted_mib"] = round(predict(model, images, loss, target=labels).step_bytes / MIB, 2)
        try:
            run = partial(step, model)
            row["measured_mib"] = round(peak_bytes(run, before=run) / MIB, 2)
        except RuntimeError as error:  # streams in bfloat16 drift, and a deep network refuses
            row["refused"] = str(error).split(",")[0]
    return row


HEAD = """\
## Predicted and measured

By how much the predicted peak of a training step is off the measured one: `revseg.memory.predict` runs the step
on fake tensors, without its memory. In float32 and, behind it, in bfloat16; "refused" where streams in bfloat16
drift too far.
"""


def sections(results: Results) -> list[str]:
    result = results.get("prediction")
    return [HEAD, markdown(table(result)), source(result)] if result else []


def table(result: Any) -> Table:
    """Networks down, ways across."""
    n, *image = result["settings"]["size"]
    found = {(row["network"], row["way"], row["dtype"]): row for row in result["rows"]}
    names = dict.fromkeys(row["network"] for row in result["rows"])
    rows = [
        [name, *(" / ".join(_off(found.get((name, way, d))) for d in DTYPES) for way in WAYS)]
        for name in names
    ]
    return [size([n, 3, *image]), *WAYS], rows


def _off(row: Row | None) -> str:
    if row is None:
        return ""
    return "refused" if "refused" in row else f"{row['predicted_mib'] / row['measured_mib'] - 1:+.1%}"
