"""What a run needs to continue, in one file.

`last.pt` holds types alone that torch loads without executing anything.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from revseg.files import CheckpointError, write_atomically

FORMAT = "revseg training run, version 1"


def save_checkpoint(path: Path, state: Mapping[str, object]) -> None:
    """Writes what a run needs to continue.

    Args:
        path: The file.
        state: Tensors, numbers, strings, and dicts, lists and tuples of them.
    """
    write_atomically(path, lambda part: torch.save({"format": FORMAT, **state}, part))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU. Executes nothing that is in the file.

    Raises:
        CheckpointError: If the file is damaged or from elsewhere.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError) as error:
        raise CheckpointError(f"{path} is no checkpoint that can be loaded safely") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of revseg: expected the format {FORMAT!r}")
    return state
