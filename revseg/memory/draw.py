"""A picture of a step: live bytes over time, coloured by what they are for, the peak marked.

As PNG by matplotlib, or as one HTML file that needs nothing else and shows the module under the pointer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from revseg.files import write_text
from revseg.memory.prediction import KINDS, MIB, Moment, Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#4e79a7", "#76b7b2", "#9c755f", "#edc948", "#59a14f", "#b07aa1", "#e15759")  # of KINDS
_MOST = 1500  # moments in a picture; of more, the highest of neighbouring ones


def draw(path: str | Path, predictions: Mapping[str, Prediction], overlaid: bool = False) -> None:
    """Draws steps one below the other on one scale, a name for each.

    Args:
        path: Ends in .png or .html.
        predictions: What `revseg.memory.predict` gave.
        overlaid: Draw them on top of each other, as plain and fitted: the last one in colours, the others in grey
            behind it, each forward and each backward pass as wide as the other's.

    Raises:
        ValueError: If the path ends otherwise, or nothing is to be drawn.
    """
    path = Path(path)
    if not predictions:
        raise ValueError("expected predictions to draw, got none")
    if path.suffix == ".png":
        (_overlay_png if overlaid else _draw_png)(path, predictions)
    elif path.suffix == ".html":
        write_text(path, _html(predictions, overlaid))
    else:
        raise ValueError(f"expected a file that ends in .png or .html, got {path}")


def thinned(history: list[Moment], most: int = _MOST) -> list[Moment]:
    """At most so many moments: the highest of neighbouring ones."""
    width = -(-len(history) // most)
    groups = [history[i : i + width] for i in range(0, len(history), width)]
    return [max(group, key=lambda moment: sum(moment.bytes)) for group in groups]


def aligned(history: list[Moment], half: int = 300) -> list[Moment]:
    """So many moments of the forward pass and of the loss, and as many of what follows: the highest of neighbours."""
    behind = next((i for i, m in enumerate(history) if m.phase in ("backward", "optimizer")), len(history))
    found = []
    for part in (history[:behind], history[behind:] or history[-1:]):
        for i in range(half):
            first = i * len(part) // half
            group = part[first : max(first + 1, (i + 1) * len(part) // half)]
            found.append(max(group, key=lambda moment: sum(moment.bytes)))
    return found


def _overlay_png(path: Path, predictions: Mapping[str, Prediction]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    *behind, (name, last) = predictions.items()
    for other, prediction in behind:
        totals = [sum(moment.bytes) / MIB for moment in aligned(prediction.history)]
        label = f"{other}: peak {prediction.peak / MIB:,.1f} MiB"
        axes.fill_between(range(len(totals)), totals, color="0.85", label=label)
    moments = aligned(last.history)
    _stack(axes, moments)
    axes.axvline(len(moments) / 2, color="black", linewidth=0.5)
    title = f"{name}: peak {last.peak / MIB:,.1f} MiB; forward | backward"
    axes.set(title=title, ylabel="MiB", xlim=(0, len(moments) - 1))
    axes.set_xticks([])
    _save(figure, path)


def _draw_png(path: Path, predictions: Mapping[str, Prediction]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6 * len(predictions) + 0.6), layout="constrained")
    top = 1.15 * max(prediction.peak for prediction in predictions.values()) / MIB
    for i, (name, prediction) in enumerate(predictions.items()):
        axes = figure.add_subplot(len(predictions), 1, i + 1)
        history = thinned(prediction.history)
        _stack(axes, history)
        totals = [sum(moment.bytes) / MIB for moment in history]
        peak = totals.index(max(totals))
        where = f"{totals[peak]:,.1f} MiB, {history[peak].phase} {history[peak].module}"
        side = "left" if peak < len(history) / 2 else "right"
        axes.annotate(where, (peak, totals[peak]), ha=side, va="bottom", fontsize=8)
        backward = next((k for k, moment in enumerate(history) if moment.phase == "backward"), None)
        if backward is not None:
            axes.axvline(backward, color="black", linewidth=0.5)
        axes.set(
            title=f"{name}: forward | backward",
            ylabel="MiB",
            ylim=(0, top),
            xlim=(0, max(1, len(history) - 1)),
        )
        axes.set_xticks([])
    _save(figure, path)


def _stack(axes: Axes, moments: list[Moment]) -> None:
    """The bytes of each kind on top of each other."""
    rows = [[moment.bytes[k] / MIB for moment in moments] for k in range(len(KINDS))]
    axes.stackplot(range(len(moments)), rows, colors=COLOURS, labels=KINDS, linewidth=0)


def _save(figure: Figure, path: Path) -> None:
    import matplotlib as mpl

    figure.axes[0].legend(loc="upper left", fontsize=7)
    with mpl.rc_context({"savefig.dpi": 120}):
        figure.savefig(path)


def _html(predictions: Mapping[str, Prediction], overlaid: bool) -> str:
    chosen = aligned if overlaid else thinned
    steps = [
        {"name": name, "moments": [[m.phase, m.module, *m.bytes] for m in chosen(prediction.history)]}
        for name, prediction in predictions.items()
    ]
    data = json.dumps({"kinds": KINDS, "colours": COLOURS, "steps": steps, "overlaid": overlaid}).replace(
        "</", "<\\/"
    )
    return _PAGE.replace("DATA", data)


_PAGE = """<!doctype html>
<meta charset="utf-8"><title>Memory of a step</title>
<style>body { font: 14px sans-serif; margin: 2em } canvas { width: 100%; height: 220px; display: block }
#here { height: 3em } i { display: inline-block; width: 1em; height: 1em; margin: 0 .3em 0 1em }</style>
<p id="kinds"></p><p id="here">Point at a step.</p><div id="steps"></div>
<script>
const data = DATA;
const mib = bytes => (bytes / 2 ** 20).toFixed(1) + " MiB";
const total = moment => moment.slice(2).reduce((a, b) => a + b, 0);
const top_ = Math.max(...data.steps.flatMap(step => step.moments.map(total)));
document.getElementById("kinds").innerHTML =
  data.kinds.map((kind, k) => `<i style="background:${data.colours[k]}"></i>${kind}`).join("");
const behind = data.overlaid ? data.steps.slice(0, -1) : [];
const told = (moment, name) => `${name ? name + ", " : ""}${moment[0]} ${moment[1] || "(network)"}: ${mib(total(moment))} = `
  + data.kinds.map((kind, k) => moment[k + 2] ? `${kind} ${mib(moment[k + 2])}` : "").filter(x => x).join(", ");
for (const step of data.overlaid ? data.steps.slice(-1) : data.steps) {
  const title = document.createElement("h3"), canvas = document.createElement("canvas");
  const highest = step.moments.reduce((a, b) => total(b) > total(a) ? b : a);
  title.textContent = `${step.name}: peak ${mib(total(highest))}, ${highest[0]} ${highest[1]}`;
  document.getElementById("steps").append(title, canvas);
  canvas.width = step.moments.length; canvas.height = 220;
  const pen = canvas.getContext("2d");
  for (const other of behind) other.moments.forEach((moment, x) => {
    const height = 210 * total(moment) / top_;
    pen.fillStyle = "#d9d9d9"; pen.fillRect(x, 220 - height, 1.5, height);
  });
  step.moments.forEach((moment, x) => {
    let y = 220;
    data.kinds.forEach((_, k) => {
      const height = 210 * moment[k + 2] / top_;
      pen.fillStyle = data.colours[k]; pen.fillRect(x, y - height, 1.5, height); y -= height;
    });
    if (moment === highest) { pen.fillStyle = "black"; pen.fillRect(x, 0, 1, 220); }
  });
  canvas.onmousemove = event => {
    const x = Math.floor(event.offsetX / canvas.clientWidth * step.moments.length);
    const moment = step.moments[Math.min(Math.max(x, 0), step.moments.length - 1)];
    const lines = behind.map(other => told(other.moments[Math.min(Math.max(x, 0), other.moments.length - 1)], other.name));
    document.getElementById("here").innerText = [told(moment, behind.length ? step.name : ""), ...lines].join("\\n");
  };
}
</script>
"""
