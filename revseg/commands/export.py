"""`revseg export`: a network for other runtimes, checked after it is written."""

import os
from pathlib import Path

import torch
from rich.console import Console

from revseg.inference.export import FORMATS
from revseg.inference.export import export as export_network
from revseg.inference.folded import folded
from revseg.inference.settings import ExportSettings
from revseg.inference.trained import load


def export(settings: ExportSettings) -> Path:
    """Writes the file.

    Args:
        settings: What the command line says.

    Returns:
        The file.

    Raises:
        FileExistsError: If a file is there.
        ExportError: If the network cannot be exported so, or the file is wrong.
    """
    console = Console(highlight=False)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    ending = FORMATS[settings.format][0]
    out = (settings.out or settings.weights.with_suffix(ending)).expanduser()
    if out.exists() and not settings.overwrite:
        raise FileExistsError(f"{out} is there already: choose another --out, or --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)
    model = load(settings.weights)
    part = out.with_name(f".{out.stem}.part{out.suffix}")
    try:
        off = export_network(
            folded(model.network), part, settings.format, settings.size, settings.dynamic, settings.labels
        )
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    what = "labels" if settings.labels else "scores"
    sizes = "any size, any number" if settings.dynamic else f"1 x 3 x {settings.size[0]} x {settings.size[1]}"
    console.print(
        f"{out}: bytes [N, 3, H, W] ({sizes}) to {what}; off by {off:.1e} from PyTorch", markup=False
    )
    return out
