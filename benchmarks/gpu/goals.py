"""What the numbers should be, beside what they are."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu.setup import rounded
from benchmarks.record import Row

DTYPES = ("bfloat16", "tf32")
EAGER = ("eager", "eager channels_last")
OF_FLOOR = 0.6


def goals(rows: Sequence[Row]) -> list[Row]:
    """A row for each goal: what, for which dtype, the least value that it should have, the value, and whether met.

    A value is None where something it needs was not measured. Of several rivals the best counts.
    """
    found = []
    for dtype in DTYPES:
        here = [row for row in rows if row.get("dtype") == dtype]
        for case in ("F forward", "block forward", "block step"):
            value = _value(here, case, "revseg", "of_floor")
            found.append(_goal(f"{case}: share of the bandwidth of a copy", dtype, OF_FLOOR, value))
        for name, least, rivals in (
            ("plain eager, activations stored", 1.7, EAGER),
            ("torch.compile, activations stored", 1.15, ("compile",)),
            ("eager reversible", 2.5, ("eager reversible", "eager reversible channels_last")),
        ):
            value = _speedup(here, "block step", ("revseg",), rivals)
            found.append(_goal(f"block step: times faster than {name}", dtype, least, value))
        reversible = ("revseg balanced", "revseg lowest")
        value = _speedup(here, "VNet step", reversible, ("plain", "plain channels_last"))
        found.append(_goal("VNet reversible step: times faster than plain eager", dtype, 1.0, value))
        value = _speedup(here, "loss and gradient", ("revseg",), ("PyTorch",))
        found.append(_goal("upsample + cross-entropy: times faster than PyTorch", dtype, 4.0, value))
        peaks = [_value(here, "loss and gradient", way, "peak_mib") for way in ("PyTorch", "revseg")]
        value = peaks[0] / peaks[1] if peaks[0] and peaks[1] else None
        found.append(_goal("upsample + cross-entropy: times less memory than PyTorch", dtype, 50.0, value))
    return found


def _goal(what: str, dtype: str, least: float, value: float | None) -> Row:
    met = None if value is None else value >= least
    value = None if value is None else rounded(value)
    return {"case": "goal", "what": what, "dtype": dtype, "least": least, "value": value, "met": met}


def _speedup(rows: Sequence[Row], case: str, ours: Sequence[str], rivals: Sequence[str]) -> float | None:
    """The time of the fastest rival, divided by that of our fastest way."""
    times = [
        min((t for way in ways if (t := _value(rows, case, way, "ms")) is not None), default=None)
        for ways in (ours, rivals)
    ]
    return times[1] / times[0] if times[0] and times[1] else None


def _value(rows: Sequence[Row], case: str, way: str, key: str) -> float | None:
    for row in rows:
        if row.get("case") == case and row.get("way") == way and key in row:
            value = row[key]
            return float(value["median"] if isinstance(value, dict) else value)
    return None
