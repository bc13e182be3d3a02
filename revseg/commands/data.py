"""`revseg data`: looking at a data set before a network does.

`check` reads every file and names what is broken or odd, `show` draws samples and class statistics, `cache`
decodes everything once, `synthesize` writes generated scenes as files. The settings stand here and import no
torch, so that the command line can answer at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from revseg.training.choices import check_choice, key_values, registered_names

if TYPE_CHECKING:
    from revseg.data import SegmentationDataset
    from revseg.data.examine import SplitReport


@dataclass(frozen=True)
class DataSettings:
    """Which data set."""

    data: str = "folder"
    """Data set: folder (any images and labels with a class table), cityscapes, camvid or synthetic."""
    root: Path | None = None
    """Folder of the data set, for data sets that are read from files."""
    data_args: tuple[str, ...] = ()
    """Options of the data set, as in: table=coarse.yaml."""
    splits: tuple[str, ...] = ("train", "val")
    """Splits to read."""
    size: tuple[int, int] | None = None
    """Height and width that samples are resized to; by default those of the data set."""
    samples: int | None = None
    """Only the first so many samples of each split; by default all."""
    seed: int = 0
    """Seed of generated scenes."""

    def __post_init__(self) -> None:
        check_choice("--data", self.data, registered_names("data", "DATASETS"))
        if not self.splits:
            raise ValueError("expected at least one split in --splits, got none")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"expected --samples of at least 1, got {self.samples}")
        self.options()

    def options(self) -> dict[str, Any]:
        """What `data_args` say, as keyword arguments.

        Raises:
            ValueError: If an entry is not key=value.
        """
        return key_values("--data-args", self.data_args)

    def dataset(self, split: str) -> "SegmentationDataset":
        """The samples of a split, without a transform."""
        from revseg.data import create_dataset

        return create_dataset(
            self.data,
            split,
            root=None if self.root is None else self.root.expanduser(),
            size=self.size,
            seed=self.seed,
            samples=self.samples,
            **self.options(),
        )


@dataclass(frozen=True)
class CheckSettings(DataSettings):
    """Read every sample of a data set; name each broken file and what is odd."""

    workers: int = 0
    """Number of processes that read; 0 reads in the main process."""
    out: Path | None = None
    """File for the report as JSON."""


@dataclass(frozen=True)
class ShowSettings(DataSettings):
    """Draw samples under their labels, and how much there is of each class."""

    out: Path = Path("runs/data")
    """Folder for samples.png, classes.png and classes.json."""
    drawn: int = 6
    """Samples of each split to draw, spread over it."""
    workers: int = 0
    """Number of processes that read; 0 reads in the main process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drawn < 1:
            raise ValueError(f"expected --drawn of at least 1, got {self.drawn}")


@dataclass(frozen=True)
class CacheSettings(DataSettings):
    """Decode and resize every sample once, into files that are read without decoding."""

    out: Path = Path("cache")
    """Folder for the cache; a folder of its own for each split in it."""


@dataclass(frozen=True)
class SynthesizeSettings:
    """Write generated street scenes as files."""

    out: Path
    """Folder of the new data set; must be empty or new."""
    layout: str = "cityscapes"
    """Its folders and file names: cityscapes."""
    size: tuple[int, int] = (1024, 2048)
    """Height and width of the scenes."""
    train_samples: int = 20
    """Number of training scenes."""
    val_samples: int = 5
    """Number of validation scenes."""
    data_args: tuple[str, ...] = ()
    """Options of the scenes, as in: thin=1 small=1 context=1."""
    seed: int = 0
    """Another seed gives other cities and scenes."""

    def __post_init__(self) -> None:
        check_choice("--layout", self.layout, ("cityscapes",))


def check(settings: CheckSettings) -> None:
    """Prints a report of every split, and writes it if the settings say so.

    Raises:
        BrokenDatasetError: If anything is broken; after all of it was named.
        ValueError: If a setting is wrong.
    """
    from rich.console import Console

    from revseg.data import BrokenDatasetError
    from revseg.data.examine import oddities

    console = Console(highlight=False, soft_wrap=True)
    reports, problems = {}, list[str]()
    for split in settings.splits:
        try:
            dataset = settings.dataset(split)
        except BrokenDatasetError as error:
            problems += [f"{split}: {problem}" for problem in error.problems]
        except FileNotFoundError as error:
            problems.append(f"{split}: {error}")
        else:
            reports[split] = _examined(console, split, dataset, settings.workers)
            problems += [f"{split}: {problem}" for problem in reports[split].problems]
    odd = oddities(reports)
    for split, report in reports.items():
        sizes = ", ".join(f"{h} x {w}" for (h, w), _ in report.sizes.most_common(3))
        console.print(
            f"{split}: {len(report.samples)} samples of {sizes or 'no size'}, {report.labelled:.1%} of the "
            "pixels labelled",
            markup=False,
        )
    for remark in odd:
        console.print(f"odd: {remark}", markup=False)
    for problem in problems:
        console.print(f"broken: {problem}", markup=False)
    if settings.out is not None:
        _write_json(
            settings.out,
            {
                "data": settings.data,
                "problems": problems,
                "odd": odd,
                "splits": {split: report.as_json() for split, report in reports.items()},
            },
        )
    if problems:
        raise BrokenDatasetError([f"{len(problems)} broken samples or files; see the lines above"])
    console.print("nothing is broken")


def show(settings: ShowSettings) -> None:
    """Writes pictures of samples and of class shares, and these as numbers.

    Raises:
        ValueError: If a setting is wrong, or a sample that is drawn is broken.
    """
    from rich.console import Console

    from revseg.data.draw import draw_sheet, draw_statistics

    console = Console(highlight=False, soft_wrap=True)
    datasets = {split: settings.dataset(split) for split in settings.splits}
    reports = {
        split: _examined(console, split, dataset, settings.workers) for split, dataset in datasets.items()
    }
    pairs = []
    for dataset in datasets.values():
        count = min(settings.drawn, len(dataset))
        pairs += [dataset[i * len(dataset) // count] for i in range(count)]
    classes = next(iter(datasets.values())).classes
    draw_sheet(settings.out / "samples.png", pairs, classes)
    draw_statistics(settings.out / "classes.png", reports)
    _write_json(settings.out / "classes.json", {split: report.as_json() for split, report in reports.items()})
    console.print(f"samples.png, classes.png and classes.json are in {settings.out}", markup=False)


def cache(settings: CacheSettings) -> None:
    """Writes the cache of every split.

    Raises:
        ValueError: If a setting is wrong or a sample broken.
        OSError: If the disk is too small or the folder cannot be written to.
    """
    from rich.console import Console

    from revseg.data.cache import write_cache

    console = Console(highlight=False, soft_wrap=True)
    for split in settings.splits:
        dataset = settings.dataset(split)
        dataset.verify()
        with _progress(console, split, len(dataset)) as step:
            write_cache(dataset, settings.out / split, step)
    console.print(
        f"the cache is in {settings.out}: add cache={settings.out} to --data-args of revseg train",
        markup=False,
    )


def synthesize(settings: SynthesizeSettings) -> None:
    """Writes generated scenes as a data set of files.

    Raises:
        ValueError: If a setting is wrong or the folder holds something.
        OSError: If it cannot be written to.
    """
    from rich.console import Console

    from revseg.data.synthetic.dataset import SyntheticStreets
    from revseg.data.synthetic.export import write_cityscapes

    out = settings.out.expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"expected an empty or new folder for --out, got {out}")
    console = Console(highlight=False, soft_wrap=True)
    options = DataSettings("synthetic", data_args=settings.data_args).options()
    for split, samples in (("train", settings.train_samples), ("val", settings.val_samples)):
        scenes = SyntheticStreets(
            split, size=settings.size, seed=settings.seed, samples=samples, **options
        )  # fmt: skip
        with _progress(console, split, len(scenes)) as step:
            write_cityscapes(scenes, out, split, step)
    console.print(
        f"the scenes are in {out}: revseg train --data {settings.layout} --root {out}", markup=False
    )


def _examined(console: object, split: str, dataset: "SegmentationDataset", workers: int) -> "SplitReport":
    from revseg.data.examine import examine

    with _progress(console, split, len(dataset)) as step:
        return examine(dataset, workers, step)


@contextmanager
def _progress(console: object, name: str, total: int) -> Iterator[Callable[[], object]]:
    """A bar on a terminal, nothing elsewhere; the function is to be called after each sample."""
    from rich.console import Console
    from rich.progress import Progress

    assert isinstance(console, Console)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=total)
        yield lambda: progress.advance(task)


def _write_json(path: Path, content: dict[str, object]) -> None:
    import json

    from revseg.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")
