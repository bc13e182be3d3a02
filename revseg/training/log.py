"""Where the epochs of a run are logged to, beside log.jsonl: TensorBoard, Weights & Biases."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from revseg.training.distributed import Team
from revseg.training.folder import Progress, Record
from revseg.training.settings import TrainSettings


@contextmanager
def loggers(settings: TrainSettings, progress: Progress, team: Team) -> Iterator[Callable[[Record], None]]:
    """A function that logs the record of an epoch to all that the settings name."""
    with ExitStack() as stack:
        writers: list[Callable[[int, dict[str, float]], None]] = []
        if "tensorboard" in settings.log and team.is_first:
            from torch.utils.tensorboard import SummaryWriter

            board: Any = SummaryWriter(settings.out / "tensorboard", purge_step=progress.epoch + 1)
            stack.callback(board.close)
            writers.append(lambda epoch, values: [board.add_scalar(k, v, epoch) for k, v in values.items()])  # type: ignore[arg-type]
        if "wandb" in settings.log and team.is_first:
            import wandb  # type: ignore[import-not-found, unused-ignore]

            run = wandb.init(
                project="revseg",
                name=settings.out.name,
                dir=settings.out,
                config=settings.as_json(),
                resume="allow",
            )
            stack.callback(run.finish)
            writers.append(lambda epoch, values: run.log({"epoch": epoch, **values}))

        def write(record: Record) -> None:
            for writer in writers:
                writer(record["epoch"], scalars(record))

        yield write


def scalars(record: Record) -> dict[str, float]:
    """The numbers of an epoch by flat names; those that do not exist, for a class that does not occur, are left out."""
    values = {key: value for key, value in record.items() if key not in ("epoch", "iou")}
    values |= {f"iou/{name}": value for name, value in record["iou"].items()}
    return {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
