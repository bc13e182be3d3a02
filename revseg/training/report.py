"""What a training run shows: progress, tables, curves, sample pictures.

On a terminal the progress is a bar, in a log file it is a line now and then. Libraries that only
draw are imported when something is drawn.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from revseg.data import ClassTable
from revseg.files import write_atomically

LINE_EVERY = 50  # steps, without a terminal


@contextmanager
def step_progress(
    console: Console, epoch: str, steps: int, done: int = 0
) -> Iterator[Callable[[float], None]]:
    """The steps of an epoch as they go.

    Args:
        console: Where to print.
        epoch: The name of the epoch, as in "epoch 3/20".
        steps: How many steps there will be.
        done: How many are done already.

    Yields:
        A function to call with the loss after each step.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(epoch, total=steps, completed=done)
        numbers = count(done + 1)

        def show(loss: float) -> None:
            step, text = next(numbers), f"{epoch}  loss {loss:.4f}"
            bar.update(task, advance=1, description=text)
            if not console.is_terminal and step % LINE_EVERY == 0:
                console.print(f"{text}  step {step}/{steps}")

        yield show


def epoch_line(record: Mapping[str, Any], epochs: int) -> str:
    """An epoch of the log in one line."""
    miou = "-" if record["miou"] is None else f"{100 * record['miou']:.2f} %"
    return (
        f"epoch {record['epoch']}/{epochs}  loss {record['loss']:.4f}  val loss {record['val_loss']:.4f}  "
        f"mIoU {miou}  lr {record['lr']:.2e}  {record['seconds']:.1f} s"
    )


def result_table(title: str, iou: Mapping[str, float | None], miou: float | None) -> Table:
    """Intersection over union of every class, and their mean."""
    table = Table(title=title, min_width=40)
    table.add_column("class")
    table.add_column("IoU %", justify="right")
    for name, value in iou.items():
        table.add_row(name, _percent(value))
    table.add_section()
    table.add_row("mean", _percent(miou))
    return table


def memory_table(peaks: Mapping[str, int], predicted: Mapping[str, int], batch: Sequence[int]) -> Table:
    """Peak memory of a training step by memory mode, and how many times the first one's it is.

    Args:
        peaks: Measured bytes by mode; a mode that did not fit is missing.
        predicted: Predicted bytes of all modes.
        batch: The shape of the images.
    """
    table = Table(title="Peak memory of a training step, batch " + " x ".join(map(str, batch)), min_width=64)
    table.add_column("activations")
    table.add_column("peak MiB", justify="right")
    table.add_column("predicted MiB", justify="right")
    table.add_column("ratio", justify="right")
    complete = peaks.keys() == predicted.keys()
    bytes_of = peaks if complete else predicted
    first = bytes_of[next(iter(predicted))]
    for mode, guess in predicted.items():
        measured = f"{peaks[mode] / 2**20:.1f}" if mode in peaks else "does not fit"
        table.add_row(mode, measured, f"{guess / 2**20:.1f}", f"{bytes_of[mode] / first:.2f}")
    return table


def draw_curves(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Writes a PNG of the losses and the mIoU over the epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = [record["epoch"] for record in history]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    losses.plot(epochs, [record["loss"] for record in history], marker=".", label="training")
    losses.plot(epochs, [record["val_loss"] for record in history], marker=".", label="validation")
    losses.set(xlabel="epoch", ylabel="loss")
    losses.legend()
    miou = [float("nan") if record["miou"] is None else 100 * record["miou"] for record in history]
    scores.plot(epochs, miou, marker=".", color="tab:green")
    scores.set(xlabel="epoch", ylabel="validation mIoU %")
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    FigureCanvasAgg(figure)  # no window, whatever the user's settings say
    write_atomically(path, lambda part: figure.savefig(part, format="png"))


def draw_samples(
    path: Path, rows: Sequence[tuple[Tensor, Tensor, Tensor]], classes: ClassTable, gap: int = 4
) -> None:
    """Writes a PNG with image, label and prediction side by side, a sample a row, and a legend.

    Args:
        path: The file.
        rows: For each sample the image [3, H, W], the label [H, W] and the prediction [H, W], all uint8.
        classes: Gives names and colours.
        gap: White pixels between the pictures.
    """
    from PIL import Image, ImageDraw, ImageFont

    cell_h = max(image.shape[1] for image, _, _ in rows) + gap
    cell_w = max(image.shape[2] for image, _, _ in rows) + gap
    width = 3 * cell_w - gap
    entries = list(zip(classes.names, classes.colours, strict=True))
    if any((label == classes.ignore).any() for _, label, _ in rows):
        entries.append(("not labelled", (0, 0, 0)))
    font: Any = ImageFont.load_default(size=max(13, width // 75))
    line = round(1.5 * font.size)
    column = 2 * line + max(round(font.getlength(name)) for name, _ in entries)
    per_line = max(1, width // column)
    sheet = Image.new(
        "RGB", (width, 2 * line + cell_h * len(rows) + line * -(-len(entries) // per_line)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for i, title in enumerate(("image", "label", "prediction")):
        pen.text((i * cell_w + cell_w // 2, line // 2), title, fill="black", font=font, anchor="mm")
    for row, (image, label, predicted) in enumerate(rows):
        pictures = (image.permute(1, 2, 0), classes.colorize(label), classes.colorize(predicted))  # [H, W, 3]
        for i, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture.contiguous().numpy()), (i * cell_w, line + row * cell_h))
    top = line + cell_h * len(rows) + line // 2
    for i, (name, colour) in enumerate(entries):
        x, y = gap + column * (i % per_line), top + line * (i // per_line)
        pen.rectangle((x, y + line // 6, x + line, y + 5 * line // 6), fill=colour)
        pen.text((x + 4 * line // 3, y + line // 2), name, fill="black", font=font, anchor="lm")
    write_atomically(path, lambda part: sheet.save(part, format="PNG"))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
