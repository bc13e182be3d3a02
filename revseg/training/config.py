"""Settings from files: a YAML file of the user, or the settings of the run that goes on.

What counts more comes later: the defaults, the file, the flags. A run that goes on begins with its
own settings, so `revseg train --resume --out runs/x` needs no other flag.
"""

import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from revseg.training.choices import meant_setting
from revseg.training.settings import TrainSettings

OF_ONE_CALL = ("config", "out", "resume", "allow_change", "overwrite", "dry_run")  # not taken over on resume


def settings_from(
    values: Mapping[str, object], source: str = "the settings", **more: object
) -> TrainSettings:
    """Settings from a mapping, as a YAML or JSON file gives it.

    Args:
        values: By field of `TrainSettings`; "-" may stand for "_".
        source: Where they are from, for messages.
        **more: Fields that count more.

    Raises:
        ValueError: If a key is unknown, or a value is of another kind or out of its range.
    """
    hints = typing.get_type_hints(TrainSettings)
    known: dict[str, Any] = {}
    for key, value in values.items():
        field = str(key).replace("-", "_")
        if field not in hints:
            meant = meant_setting(str(key), [field.replace("_", "-") for field in hints])
            hint = f"did you mean {meant}?" if meant else f"the keys are {', '.join(hints)}"
            raise ValueError(f"unknown key {key!r} in {source}; {hint}")
        try:
            known[field] = _fitted(value, hints[field])
        except (TypeError, ValueError):
            expected = getattr(hints[field], "__name__", str(hints[field]))
            raise ValueError(f"expected {key} in {source} to be {expected}, got {value!r}") from None
    try:
        return TrainSettings(**{**known, **more})
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def read_settings(path: Path) -> TrainSettings:
    """Settings from a YAML file, of which JSON is a part.

    Raises:
        ValueError: If the file is no mapping, or a key or a value is wrong.
        OSError: If it cannot be read.
    """
    return settings_from(_mapping(path), str(path), config=path)


def starting_settings(words: Sequence[str]) -> TrainSettings:
    """What the flags of a command line are added to: the defaults, a file, or the run that goes on.

    Args:
        words: The flags.

    Raises:
        ValueError: If a file that they name is wrong.
        OSError: If it cannot be read.
    """
    given = {
        word: following
        for word, following in zip(words, [*words[1:], ""], strict=True)
        if word in ("--config", "--resume", "--out")
    }
    settings = TrainSettings()
    if "--resume" in given:
        named = given["--resume"]
        folder = Path(given.get("--out", settings.out) if named in ("True", "") else named).expanduser()
        folder = folder if folder.is_dir() else folder.parent
        if (folder / "settings.json").is_file():
            values = _mapping(folder / "settings.json")
            kept = {key: value for key, value in values.items() if key not in OF_ONE_CALL}
            settings = settings_from(kept, str(folder / "settings.json"), out=folder)
    if "--config" in given:
        path = Path(given["--config"]).expanduser()
        of_file = read_settings(path)
        named_keys = {str(key).replace("-", "_") for key in _mapping(path)} | {"config"}
        settings = replace(settings, **{key: getattr(of_file, key) for key in named_keys})
    return settings


def _mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
    else:
        import yaml

        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(  # noqa: TRY004, not a caller's mistake
            f"expected settings by name in {path}, got {type(values).__name__}"
        )
    return values


def _fitted(value: object, hint: Any) -> object:
    """A value of a file as the type of its field.

    Raises:
        TypeError: If it is of another kind.
        ValueError: If it is a text that does not say such a value.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        for part in parts:
            try:
                return _fitted(value, part)
            except (TypeError, ValueError):
                continue
        raise TypeError
    if origin is tuple:
        if isinstance(value, Mapping):  # of key=value entries
            value = [
                f"{key}={each!r}" if not isinstance(each, str) else f"{key}={each}"
                for key, each in value.items()
            ]
        items = value if isinstance(value, (list, tuple)) else [value]
        kinds = [parts[0]] * len(items) if parts[1:] == (...,) else parts
        return tuple(_fitted(item, kind) for item, kind in zip(items, kinds, strict=True))
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return float(value)  # YAML reads 5e-4 as a text
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError
    return value
