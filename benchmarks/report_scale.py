"""The section of `benchmarks/README.md` on scale, from `results/scale.json`."""

from typing import Any

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

HEAD = """\
## Scale

VNet's training step when one thing grows and the rest stays at {base}. MiB as predicted on fake tensors from the
least value of the series to its greatest, the line through them with its greatest deviation, how far measurements
here are from the predictions at most, and what a card of {card} GB would hold by the line if it grew alone (a prediction;
"no limit" where nothing grows). Time is that of a step as a ratio to plain's, from the least value timed to the greatest.
"""


def head(result: Result) -> str:
    base = ", ".join(f"{name} {value:,}" for name, value in result["settings"]["base"].items())
    return HEAD.format(base=base, card=result["settings"]["card_gb"])


def table(result: Result) -> Table:
    """Series and levels down."""
    rows = []
    for row in result["rows"]:
        predicted, measured, law = row["predicted_mib"], row["measured_mib"], row["law"]
        off = [abs(predicted[at] / measured[at] - 1) for at in measured]
        ratios = [each["ratio"]["median"] for each in row["time"].values()]
        ends = list(predicted)
        rows.append([
            f"{row['series']}, {ends[0]} to {ends[-1]}",
            row["level"],
            f"{predicted[ends[0]]:,.0f} to {predicted[ends[-1]]:,.0f}",
            f"{law['fixed']:,.1f} + {law['slope']:,.2f} x ({law['off']:.1%})",
            f"{max(off):.1%}" if off else "",
            "no limit" if row["held"] is None else f"{row['held']:,.0f}",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}" if ratios else "",
        ])  # fmt: skip
    return ["", "level", "MiB", "line", "off", "held", "time"], rows
