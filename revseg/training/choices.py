"""Values that settings may have, and what is said about others: the near misses above all.

Nothing here imports torch: the names of networks and data sets are read from the text of their
registries.
"""

import ast
import math
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

ALIASES = {  # what other programs call our settings
    **dict.fromkeys(("learning-rate", "learning-rate-init", "base-lr"), "lr"),
    **dict.fromkeys(("batch-size", "bs", "samples-per-gpu", "train-batch-size"), "batch"),
    **dict.fromkeys(("num-workers", "n-workers", "dataloader-workers", "jobs"), "workers"),
    **dict.fromkeys(("num-epochs", "max-epochs", "n-epochs", "epoch"), "epochs"),
    **dict.fromkeys(("dataset", "data-set", "dataset-name"), "data"),
    **dict.fromkeys(("data-root", "data-dir", "data-path", "dir", "dataset-root"), "root"),
    **dict.fromkeys(("network", "arch", "architecture", "net", "backbone"), "model"),
    **dict.fromkeys(("img-size", "image-size", "input-size", "resolution", "height", "width"), "size"),
    **dict.fromkeys(("output", "output-dir", "out-dir", "save-dir", "work-dir", "logdir"), "out"),
    **dict.fromkeys(("amp", "fp16", "bf16", "mixed-precision", "dtype", "half"), "precision"),
    **dict.fromkeys(("pretrained", "init", "finetune", "checkpoint", "load"), "weights"),
    **dict.fromkeys(("gpu", "gpus", "cuda", "cpu"), "device"),
    **dict.fromkeys(("wd", "l2"), "weight-decay"),
    **dict.fromkeys(("scheduler", "lr-scheduler", "lr-schedule"), "schedule"),
    **dict.fromkeys(("warmup-steps", "warmup-iters", "warmup-epochs"), "warmup"),
    **dict.fromkeys(("grad-clip", "clip-grad", "max-grad-norm", "clip-grad-norm"), "clip"),
    **dict.fromkeys(
        ("accum", "grad-accum", "gradient-accumulation-steps", "accumulation-steps"), "accumulate"
    ),
    **dict.fromkeys(("optim", "opt"), "optimizer"),
    **dict.fromkeys(("flip", "horizontal-flip", "mirror"), "hflip"),
    **dict.fromkeys(("random-seed", "manual-seed"), "seed"),
    **dict.fromkeys(("ema-decay",), "ema"),
    **dict.fromkeys(("continue", "resume-from"), "resume"),
    **dict.fromkeys(("force",), "overwrite"),
    **dict.fromkeys(("tensorboard", "wandb", "logger"), "log"),
    **dict.fromkeys(("sync-batchnorm", "syncbn", "sync-batch-norm"), "sync-bn"),
    **dict.fromkeys(("strategy", "fsdp", "ddp"), "parallel"),
    **dict.fromkeys(("color-jitter", "colour-jitter", "jitter"), "photometric"),
    **dict.fromkeys(("yaml", "cfg", "config-file"), "config"),
}


def flag(field: str) -> str:
    """The flag of a field."""
    return "--" + field.replace("_", "-")


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that was probably meant."""
    plain = {re.sub(r"[-_\s]", "", choice).lower(): choice for choice in choices}
    found = get_close_matches(re.sub(r"[-_\s]", "", word).lower(), plain, n=1, cutoff=0.6)
    return plain[found[0]] if found else None


def meant_setting(word: str, settings: Collection[str]) -> str | None:
    """The setting that was probably meant: what other programs call so, or the one that is spelt like it."""
    meant = ALIASES.get(word.replace("_", "-").lower())
    return meant if meant in settings else nearest(word, settings)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuses a value that is none of the choices.

    Raises:
        ValueError: With the choice that was probably meant, and all of them.
    """
    if value not in choices:
        meant = nearest(value, choices)
        hint = f"did you mean {meant}? " if meant else ""
        raise ValueError(f"unknown {name} {value!r}; {hint}choose one of {', '.join(choices)}")


def registered_names(part: str, registry: str) -> tuple[str, ...]:
    """The keys of a registry, such as MODELS of revseg.models, in order.

    Those of a package that is imported already are what they are now, with what a user has added; of another one
    its file is read, as importing it would import torch.

    Args:
        part: The package under revseg whose __init__.py defines the registry.
        registry: The name of a dict that is filled by literals.
    """
    if (package := sys.modules.get(f"revseg.{part}")) is not None and hasattr(package, registry):
        return tuple(sorted(getattr(package, registry)))
    names: list[str] = []
    source = Path(__file__).parents[1] / part / "__init__.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and target.id == registry and isinstance(value, ast.Dict):
            names += [str(key.value) for key in value.keys if isinstance(key, ast.Constant)]
    return tuple(sorted(names))


def key_values(name: str, entries: Sequence[str]) -> dict[str, Any]:
    """What entries like key=value say, values as Python writes them or else as text.

    Raises:
        ValueError: If an entry is not key=value.
    """
    result: dict[str, Any] = {}
    for entry in entries:
        key, equals, text = entry.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"expected {name} as key=value, got {entry!r}")
        try:
            result[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            result[key] = text
    return result


def check_bounds(settings: Any) -> None:
    """Refuses numbers of `TrainSettings` that are out of their range.

    Raises:
        ValueError: With the flag, its range and what came.
    """
    least: dict[str, float] = {
        **dict.fromkeys(("batch", "epochs", "train_samples", "val_samples", "threads"), 1),
        **dict.fromkeys(("accumulate", "save_steps", "pictures"), 1),
        **dict.fromkeys(("lr", "power", "weight_decay", "workers", "seed", "momentum", "warmup"), 0),
        **dict.fromkeys(("aux_weight", "save_minutes", "keep"), 0),
    }
    for field, bound in least.items():
        value = getattr(settings, field)
        if value is not None and not (value >= bound and math.isfinite(value)):
            raise ValueError(f"expected {flag(field)} of at least {bound}, got {value}")
    if settings.seed >= 2**32:
        raise ValueError(f"expected --seed below 2**32, got {settings.seed}")
    if not all(0 <= beta < 1 for beta in settings.betas):
        raise ValueError(f"expected --betas in [0, 1), got {settings.betas}")
    if settings.ema is not None and not 0 < settings.ema < 1:
        raise ValueError(f"expected --ema in (0, 1), got {settings.ema}")
    if settings.clip is not None and not settings.clip > 0:
        raise ValueError(f"expected --clip above 0, got {settings.clip}")
    if not 0 < settings.ohem_threshold <= 1:
        raise ValueError(f"expected --ohem-threshold in (0, 1], got {settings.ohem_threshold}")
    if not 0 <= settings.label_smoothing < 1:
        raise ValueError(f"expected --label-smoothing in [0, 1), got {settings.label_smoothing}")
    for field in ("size", "crop"):
        size = getattr(settings, field)
        if size is not None and min(size) < 16:
            raise ValueError(f"expected {flag(field)} of at least 16 x 16, got {size[0]} x {size[1]}")
    if settings.scale is not None and not 0 < settings.scale[0] <= settings.scale[1] < math.inf:
        raise ValueError(f"expected --scale 0 < lowest <= highest, got {settings.scale}")
