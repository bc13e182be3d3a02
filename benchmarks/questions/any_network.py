"""What does `revseg.fit` make of networks that people bring, beside PyTorch's own means and the rivals'?

Eleven networks (`benchmarks.architectures`), every way (`benchmarks.any_network_ways`) in a process of its own:

- peak of a training step with cross-entropy at the size of the labels, by the allocator, beyond parameters, images and
  labels; of the plain and a fitted network also the peak that is predicted, beyond the same;
- time of a step as a ratio to the plain step next to it, at the same size, the two in turns; not with `--rounds 0`;
- predicted on shapes alone, at the size of the network's paper or of common use, what libraries copy inside not counted:
  plain and fitted, within 1.35 times the time and at any; whether a smaller budget ever gives a higher peak; and how far
  the plan for a batch of 4 is off at 8, by the line through its peaks at 2 and 4.

momentumnet and memcnn take rows of residual blocks that change the network, and none of these has such a row alone.

    python -m benchmarks measure any_network                      small sizes, with times
    python -m benchmarks measure any_network --rounds 0           peaks alone; any load
    python -m benchmarks measure any_network --names "U-Net 2-D" --ways plain fit --rounds 3

Rows of networks and ways that are not named stay as they are.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import process, record
from benchmarks.any_network_ways import ANY_TIME, CRITERION, TIME, WAYS, search_of
from benchmarks.architectures import ARCHITECTURES
from benchmarks.network_ways import NotAllowedError
from benchmarks.peers import MISSING
from benchmarks.record import Results, Row
from benchmarks.rivals import is_available
from benchmarks.segmentation import MIB
from benchmarks.tables import NOT_RUN, Table, markdown, size, source, unique
from benchmarks.timing import environment, in_turns, spread
from revseg.memory import Plan, peak_bytes, predict

QUESTION = "What does fit make of networks that people bring, beside PyTorch's own means and the rivals'?"
ORDER = 3.5
ASKED = "full size"  # the way of rows that are predicted
LIMIT_S = 1800  # of one process
ROUNDS = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", nargs="+", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--ways", nargs="+", default=[*WAYS, ASKED], choices=[*WAYS, ASKED], metavar="WAY")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of timing; 0 for none")
    parser.add_argument("--threads", type=int, default=1)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"threads": args.threads}


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    path = args.out / "any_network.jsonl"
    named = {(name, way) for name in args.names for way in args.ways}
    earlier = record.earlier_rows(path, settings(args), lambda row: (row["network"], row["way"]) not in named)
    rows = {(row["network"], row["way"]): row for row in earlier}
    for name in args.names:
        for way in args.ways:
            rows[name, way] = _row(name, way, args.rounds, args.threads)
            print(rows[name, way], flush=True)
            order = [(each, which) for each in ARCHITECTURES for which in (*WAYS, ASKED)]
            yield [rows[key] for key in order if key in rows]


def _row(name: str, way: str, rounds: int, threads: int) -> Row:
    """What one process finds; a note where it does not come to its end."""
    row: Row = {"network": name, "way": way}
    if way != ASKED and not is_available(way):
        return row | {"note": MISSING} | record.stamp()
    place = environment("keeps pages", threads)
    job = _full_size if way == ASKED else _job
    found, end = process.run(job, name, way, rounds, threads, environment=place, limit=LIMIT_S)
    for each in found:
        row |= each
    return row | ({"note": end} if end else {}) | record.stamp()


def _job(name: str, way: str, rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    """Parts of a row, one after another, so that those before a failure are kept."""
    torch.set_num_threads(threads)
    is_available(way)  # makes it importable
    shape = ARCHITECTURES[name].small
    yield {"size": list(shape)}
    try:
        step, run = step_of(name, way, shape)
        if way == "plain" or hasattr(run, "plan"):
            yield _planned(name, shape, run)
        step()
        gc.collect()
        yield {"peak_mib": round(peak_bytes(step, before=step) / MIB, 1)}
        if rounds:
            beside, _ = step_of(name, "plain", shape)
            pairs = in_turns(beside, step, rounds + 1)[1:]  # the first is a warm-up
            plain_s = round(statistics.median(a for a, _ in pairs), 4)
            yield {"plain_s": plain_s, "ratio": spread([b / a for a, b in pairs])}
    except NotAllowedError as reason:
        yield {"note": str(reason)}
    except Exception as error:  # noqa: BLE001, a library may raise anything
        yield {"note": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}


def _planned(name: str, shape: tuple[int, ...], run: Any) -> dict[str, Any]:
    """What a plan says, or a prediction of the network as it is, beyond what stands there."""
    model, (images, labels) = ARCHITECTURES[name].make(), batch(name, shape)
    standing = sum(x.nbytes for x in (*model.parameters(), *model.buffers(), images, labels))
    plan: Plan | None = getattr(run, "plan", None)
    if plan is None:
        return {"planned_mib": round(predict(model, images, CRITERION).step_bytes / MIB, 1)}
    said = {"planned_mib": round((plan.peak - standing) / MIB, 1), "planned_time": round(plan.time, 2)}
    if run.budget is not None:
        said["budget_mib"] = round((run.budget - standing) / MIB, 1)
    return said | {"parts": len(plan.parts), "by_bands": plan.by_bands}


def batch(name: str, shape: tuple[int, ...], device: str | None = None) -> tuple[Tensor, Tensor]:
    """Images, and labels of two classes."""
    torch.manual_seed(1)
    labels = (shape[0], *shape[2:])
    if device == "meta":
        return torch.empty(shape, device=device), torch.empty(labels, dtype=torch.int64, device=device)
    return torch.randn(shape), torch.randint(0, 2, labels)


def step_of(name: str, way: str, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """A training step, and what it computes its loss with."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].make()
    images, labels = batch(name, shape)
    loss = WAYS[way](model, images)
    trained = getattr(loss, "model", model)

    def step() -> None:
        loss(images, labels).backward()  # type: ignore[no-untyped-call]
        trained.zero_grad(set_to_none=True)

    return step, loss


def _full_size(name: str, way: str, rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    """Predicted at full size; laws of plans."""
    torch.set_num_threads(threads)
    shape = ARCHITECTURES[name].size
    with torch.device("meta"):
        model = ARCHITECTURES[name].make()
    images, _ = batch(name, shape, "meta")
    bitwise, search = (search_of(model, images, "cuda", bands) for bands in (None, True))
    before = search.before
    yield {"size": list(shape), "plain_mib": round(before.step_bytes / MIB, 1)}

    def beyond(peak: int) -> float:
        return round((peak - before.before) / MIB, 1)

    for kind, prefix, by in (("fit", "", bitwise), ("bands", "bands_", search)):
        started = time.process_time()
        within = by.plan(time=TIME)
        yield {
            f"{kind}_mib": beyond(within.peak),
            f"{kind}_time": round(within.time, 2),
            f"{prefix}plan_s": round(time.process_time() - started, 1),
        }
    least = search.plan(time=ANY_TIME)
    yield {"least_mib": beyond(least.peak), "least_time": round(least.time, 2)}
    budgets = [least.peak + share * (before.peak - least.peak) // 4 for share in (1, 2, 3)]
    peaks = [least.peak, *(search.plan(budget).peak for budget in budgets), before.peak]
    yield {"budgets_mib": [beyond(p) for p in peaks], "monotone": peaks == sorted(peaks)}
    of = {n: _predicted(least, model, (n, *shape[1:])) for n in (2, 4, 8)}
    yield {"law_off": round((of[4] + 2 * (of[4] - of[2])) / of[8] - 1, 4)}


def _predicted(plan: Any, model: nn.Module, shape: tuple[int, ...]) -> int:
    images = torch.empty(shape, device="meta")
    return predict(plan.apply(model), images, CRITERION, device="cuda", by_bands=plan.by_bands).peak


# --- what is said of it --------------------------------------------------------------------------

HEAD = """\
## Networks that people bring

Peak MiB of a training step of eleven networks, beyond parameters, images and labels, and behind it the time as a multiple of
plain's where it was measured. "fit" is `revseg.fit(..., time=1.35)`, with gradients to the bit, and "fit, bands" with
`bands=True`, exact but for the order of sums; "fit least" is the least that it finds so at any time, "fit halfway" a budget halfway
between that and plain. In brackets is the peak that the plan says.
"""
FULL = """\
Predicted at full size, MiB beyond parameters and images, what libraries copy inside not counted, and the time by arithmetic, which
for rows by bands comes out too low on a CPU (above); "off at 8" is the plan's peak at a batch of 8 against the line through
those at 2 and 4:
"""


def sections(results: Results) -> list[str]:
    result = results.get("any_network")
    if not result:
        return []
    return [HEAD, markdown(table(result["rows"])), FULL, markdown(full_table(result["rows"])), source(result)]


def table(rows: list[Row]) -> Table:
    """Networks down, ways across."""
    found = {(row["network"], row["way"]): row for row in rows}
    lines = []
    for name in unique(row["network"] for row in rows):
        measured = next((row for row in rows if row["network"] == name and "peak_mib" in row), None)
        if measured is not None:
            lines.append(
                [f"{name}, {size(measured['size'])}", *(_cell(found.get((name, way))) for way in WAYS)]
            )
    return ["", *WAYS], lines


def _cell(row: Row | None) -> str:
    if row is None or "peak_mib" not in row:
        return NOT_RUN
    time = f"; {row['ratio']['median']:.2f}" if "ratio" in row else ""
    planned = f" (plan {row['planned_mib']:,.0f})" if "planned_mib" in row else ""
    return f"{row['peak_mib']:,.0f}{planned}{time}"


def full_table(rows: list[Row]) -> Table:
    """Networks down."""
    head = ["", "plain", "fit", "less", "fit, bands", "less", "fit least", "less", "monotone", "off at 8"]
    return head, [
        [
            f"{row['network']}, {size(row['size'])}",
            f"{row['plain_mib']:,.0f}",
            f"{row['fit_mib']:,.0f}; {row['fit_time']:.2f}",
            f"{row['plain_mib'] / row['fit_mib']:.1f} x",
            f"{row['bands_mib']:,.0f}; {row['bands_time']:.2f}",
            f"{row['plain_mib'] / row['bands_mib']:.1f} x",
            f"{row['least_mib']:,.0f}; {row['least_time']:.2f}",
            f"{row['plain_mib'] / row['least_mib']:.1f} x",
            "yes" if row["monotone"] else "no",
            f"{row['law_off']:+.1%}",
        ]
        for row in rows
        if "law_off" in row
    ]
