"""Weights to start from, written by this library or by another program.

Files of other programs are state dicts of torch, or dicts that hold one, with the prefixes that
DistributedDataParallel and torch.compile put before names. They are loaded without executing
anything. The head is left out where it is for other classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from revseg import __version__
from revseg.data import ClassTable
from revseg.files import CheckpointError, load_weights, safetensors_header
from revseg.training.settings import TrainSettings

PREFIXES = ("module.", "_orig_mod.", "model.", "ema.")
HOLDERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "weights")


def load_starting_weights(model: nn.Module, path: Path, classes: Sequence[str]) -> list[str]:
    """Loads the weights of a file into a network.

    Args:
        model: The network.
        path: A file of `revseg.files.save_weights`, other safetensors, a checkpoint of a run, or what
            `torch.save` wrote.
        classes: Names of the classes that the network tells apart.

    Returns:
        Names of the tensors that were left out, those of the head.

    Raises:
        CheckpointError: If the file is damaged, or not one that can be loaded safely.
        ValueError: If its tensors are not those of the network.
    """
    weights, of_classes = read_weights(path)
    same = None if of_classes is None else list(of_classes) == list(classes)
    fitting = fitting_weights(model, weights, len(classes), same, str(path))
    model.load_state_dict(fitting, strict=False)
    return [name for name in model.state_dict() if name not in fitting]


def described(
    settings: TrainSettings, model: nn.Module, classes: ClassTable, size: Sequence[int]
) -> dict[str, Any]:
    """What a weights file says of its network: all that prediction needs, and where the weights come from.

    Args:
        settings: Of the run.
        model: The network.
        classes: What it tells apart.
        size: (H, W) of the images it is trained on.
    """
    normalization = getattr(model, "normalization", None)  # registered models have one
    own = {} if normalization is None else {"normalization": asdict(normalization)}
    return own | {
        "model": settings.model,
        "num_classes": len(classes),
        "hyperparameters": settings.hyperparameters(),
        "classes": list(classes.names),
        "colours": [list(colour) for colour in classes.colours],
        "size": list(size),
        "provenance": {
            "revseg": __version__,
            "torch": torch.__version__,
            "data": settings.data,
            "seed": settings.seed,
        },
    }


def read_weights(path: Path) -> tuple[dict[str, Tensor], Sequence[str] | None]:
    """The tensors of a file by name, and the classes they are for, if it says so.

    Raises:
        CheckpointError: If the file is damaged, or not one that can be loaded safely.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load

        content = path.read_bytes()
        try:
            if "revseg" in safetensors_header(content):
                weights, description = load_weights(path)
                return weights, description.get("classes")
            return _plain_names(load(content)), None
        except (SafetensorError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    try:
        content_of_torch = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged, foreign or hostile in any way: nothing of it was run
        raise CheckpointError(f"{path} is damaged, or no weights that can be loaded safely") from error
    return _plain_names(_state_dict(content_of_torch, path)), None


def _state_dict(content: Any, path: Path) -> Mapping[str, Tensor]:
    """The state dict in what torch loaded."""
    for holder in HOLDERS:
        if isinstance(content, Mapping) and isinstance(content.get(holder), Mapping):
            content = content[holder]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no weights: expected a state dict, got {type(content).__name__}")
    wrong = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if wrong:
        raise CheckpointError(
            f"{path} holds no weights: expected tensors by name, got {wrong[0]!r}, which is none"
        )
    return content


def _plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefixes that all of their names share."""
    result = dict(weights)
    while prefix := next(
        (p for p in PREFIXES if result and all(name.startswith(p) for name in result)), None
    ):
        result = {name.removeprefix(prefix): value for name, value in result.items()}
    return result


def fitting_weights(
    model: nn.Module, weights: Mapping[str, Tensor], num_classes: int, same_classes: bool | None, source: str
) -> dict[str, Tensor]:
    """Those of some weights that a network takes over: all but the head, where that is for other classes.

    Args:
        model: The network.
        weights: A state dict.
        num_classes: C of the network.
        same_classes: Whether the head is for the same classes; None if nobody knows, then its shape says it.
        source: Where they are from, for messages.

    Raises:
        ValueError: If other tensors than those of a head are missing, unknown or of another shape.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    unknown = [name for name in weights if name not in own]
    if missing or unknown:
        said = [
            f"{len(names)} {what}, first {names[0]}"
            for names, what in ((missing, "missing"), (unknown, "unknown"))
            if names
        ]
        raise ValueError(f"{source} does not fit the network: of {len(own)} tensors {' and '.join(said)}")
    head = [name for name in own if _is_of_head(own[name], weights[name], num_classes)]
    wrong = [name for name in own if own[name].shape != weights[name].shape and name not in head]
    if wrong:
        raise ValueError(
            f"{source} does not fit the network: {wrong[0]} is {list(weights[wrong[0]].shape)} "
            f"there and {list(own[wrong[0]].shape)} here"
        )
    if same_classes is False:
        head += _head_of(model, num_classes)
    return {name: weights[name] for name in own if name not in head}


def _is_of_head(own: Tensor, other: Tensor, num_classes: int) -> bool:
    """Whether two tensors differ in the number of classes alone."""
    if own.shape == other.shape or own.ndim != other.ndim:
        return False
    return all(a in (b, num_classes) for a, b in zip(own.shape, other.shape, strict=True))


def _head_of(model: nn.Module, num_classes: int) -> list[str]:
    """The tensors of the layers that make the scores: the last with one dimension of C."""
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.out_channels == num_classes
    ]
    return [f"{layers[-1]}.{name}" for name in ("weight", "bias")] if layers else []
