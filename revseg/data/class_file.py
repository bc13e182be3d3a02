"""A class table as a YAML file: what the numbers and colours in the labels of a folder mean.

    classes:
      - background                             # the id is the place in the list, here 0
      - {name: crop, id: 7, colour: [0, 160, 60]}
      - {name: weed, ids: [8, 9], colour: "#c83232"}
    ignore: [255, "#000000"]                   # ids and colours without a class; 255 unless a class has it
    labels: ids                                # or colours; by default as each file is stored
    label_suffix: _mask                        # x.jpg belongs to x_mask.png
    image: {channels: [3, 2, 1], range: [0, 10000]}    # which are red, green, blue; black and white

All of it is checked when the file is read, and every message says where the mistake is.
"""

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from revseg.data.classes import ClassTable

Colour = tuple[int, int, int]

KEYS = ("classes", "ignore", "labels", "image", "image_suffix", "label_suffix")
CLASS_KEYS = ("name", "id", "ids", "colour")
IMAGE_KEYS = ("channels", "range")
LABEL_KINDS = ("ids", "colours")
IGNORE = 255
MOST = 255  # classes that fit into a byte beside 255


@dataclass(frozen=True)
class LabelMeaning:
    """From the values in label files to classes.

    Attributes:
        path: Where it is written.
        classes: Names and colours.
        ids: The class of each id in the files; 255 for those without one.
        colours: The class of each colour in the files, written as one number.
        labels: "ids", "colours", or None for as each file is stored.
        channels: Which channels of an image file, from 1, are red, green and blue; None for its own.
        range: The values that are black and white; None for bytes as they are.
        suffixes: What the names of images and of labels end with, besides the name they share.
    """

    path: Path
    classes: ClassTable
    ids: Mapping[int, int]
    colours: Mapping[int, int]
    labels: str | None = None
    channels: tuple[int, ...] | None = None
    range: tuple[float, float] | None = None
    suffixes: tuple[str, str] = ("", "")

    def classes_of_ids(self, ids: npt.NDArray[Any], path: Path) -> npt.NDArray[np.uint8]:
        """The class of each pixel [H, W] from its id; the path is for messages."""
        return self._looked_up(ids, self.ids, path, "id", str)

    def classes_of_colours(self, pixels: npt.NDArray[np.uint8], path: Path) -> npt.NDArray[np.uint8]:
        """The class of each pixel [H, W] from its colour [H, W, 3]; the path is for messages."""
        if not self.colours:
            raise ValueError(
                f"expected class ids, got colours: {path}; to read colours give classes a colour in {self.path}"
            )
        numbers = pixels.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
        return self._looked_up(numbers, self.colours, path, "colour", lambda number: f"#{number:06x}")

    def _looked_up(
        self, values: npt.NDArray[Any], meaning: Mapping[int, int], path: Path, what: str, written: Any
    ) -> npt.NDArray[np.uint8]:
        known = np.array(sorted(meaning), dtype=np.int64)
        classes = np.array([meaning[value] for value in known.tolist()], dtype=np.uint8)
        if values.dtype == np.uint8:  # a table is faster than a search
            inside = known[known < 256]
            table, is_known = np.full(256, IGNORE, dtype=np.uint8), np.zeros(256, dtype=bool)
            table[inside], is_known[inside] = classes[known < 256], True
            found, right = np.asarray(table[values]), is_known[values]
        else:
            place = np.searchsorted(known, values).clip(max=len(known) - 1)
            found, right = classes[place], known[place] == values
        if not right.all():
            unknown, counts = np.unique(values[~right], return_counts=True)
            listed = ", ".join(
                f"{written(int(value))} in {count} pixels"
                for value, count in zip(unknown[:8], counts, strict=False)
            )
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            raise ValueError(
                f"expected labels with a class, got the {what} {listed}{more}: {path}; give it a class or list "
                f"it under ignore in {self.path}"
            )
        return np.asarray(found, dtype=np.uint8)


def read_class_file(path: Path) -> LabelMeaning:
    """The class table of a YAML file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not say what a class table says.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError("reading a class table needs PyYAML: pip install revseg[data]") from error
    if not path.is_file():
        raise FileNotFoundError(f"expected a class table, got {path}, which is no file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return _meaning(content, path)
    except _MistakeError as mistake:
        raise ValueError(f"{path}: {mistake}") from None


class _MistakeError(Exception):
    """What is wrong in a class table."""


def _meaning(content: Any, path: Path) -> LabelMeaning:
    top = _mapping(content, KEYS, "the table")
    entries = top.get("classes")
    if not isinstance(entries, list) or not entries:
        raise _MistakeError(f"expected a list of classes under the key classes, got {entries!r}")
    if len(entries) > MOST:
        raise _MistakeError(f"expected at most {MOST} classes, got {len(entries)}")
    names: list[str] = []
    shown: list[Colour] = []
    ids: dict[int, int] = {}
    colours: dict[int, int] = {}
    for place, entry in enumerate(entries):
        where = f"class {place}"
        if isinstance(entry, str):
            entry = {"name": entry}
        entry = _mapping(entry, CLASS_KEYS, where)
        name = entry.get("name")
        if not isinstance(name, str) or not name.strip():
            raise _MistakeError(
                f"{where}: expected a name, got {name!r}; put names such as yes and 1 in quotes"
            )
        if name in names:
            raise _MistakeError(f"{where}: the name {name!r} stands there twice")
        names.append(name)
        _enter_ids(entry, place, f"{where} ({name})", ids, names)
        colour = _colour(entry["colour"], f"{where} ({name})") if "colour" in entry else None
        if colour is not None:
            _enter(colours, _number(colour), place, f"{where} ({name})", "colour", names)
        shown.append(colour or _default_colour(place))
    _enter_ignored(top.get("ignore"), ids, colours, names)
    labels = top.get("labels")
    if labels is not None and labels not in LABEL_KINDS:
        raise _MistakeError(f"expected labels: ids or labels: colours, got {labels!r}")
    if labels == "colours" and (without := [n for i, n in enumerate(names) if i not in colours.values()]):
        raise _MistakeError(
            f"labels: colours needs a colour for each class, got none for {', '.join(without)}"
        )
    channels, values = _image(top.get("image"))
    return LabelMeaning(
        path, ClassTable(tuple(names), tuple(shown), IGNORE), ids, colours, labels, channels, values,
        (_suffix(top, "image_suffix"), _suffix(top, "label_suffix")),
    )  # fmt: skip


def _mapping(value: Any, keys: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _MistakeError(f"{where}: expected keys and values, got {value!r}")
    for key in value:
        if key not in keys:
            near = difflib.get_close_matches(str(key).replace("color", "colour"), keys, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise _MistakeError(f"{where}: unknown key {key!r}; choose from {', '.join(keys)}{meant}")
    return value


def _enter_ids(entry: dict[str, Any], place: int, where: str, ids: dict[int, int], names: list[str]) -> None:
    if "id" in entry and "ids" in entry:
        raise _MistakeError(f"{where}: expected id or ids, got both")
    given = entry.get("ids", [entry.get("id", place)])
    if not isinstance(given, list) or not given:
        raise _MistakeError(f"{where}: expected a list of ids, got {given!r}")
    for each in given:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < 2**31:
            raise _MistakeError(f"{where}: expected an id of at least 0, got {each!r}")
        _enter(ids, each, place, where, "id", names)


def _enter(known: dict[int, int], value: int, place: int, where: str, what: str, names: list[str]) -> None:
    if value in known:
        other = known[value]
        taken = "ignored" if other == IGNORE else f"that of class {other} ({names[other]})"
        raise _MistakeError(
            f"{where}: the {what} {value if what == 'id' else f'#{value:06x}'} is {taken} already"
        )
    known[value] = place


def _enter_ignored(given: Any, ids: dict[int, int], colours: dict[int, int], names: list[str]) -> None:
    if given is None:
        ids.setdefault(IGNORE, IGNORE)
        return
    for each in given if isinstance(given, list) else [given]:
        if isinstance(each, int) and not isinstance(each, bool):
            _enter(ids, each, IGNORE, "ignore", "id", names)
        else:
            _enter(colours, _number(_colour(each, "ignore")), IGNORE, "ignore", "colour", names)


def _colour(value: Any, where: str) -> Colour:
    """Red, green and blue from [r, g, b] or "#rrggbb"."""
    if isinstance(value, str) and value.startswith("#") and len(value) == 7:
        with contextlib.suppress(ValueError):
            value = list(bytes.fromhex(value[1:]))
    is_list = isinstance(value, list) and len(value) == 3
    if not is_list or not all(type(each) is int and 0 <= each <= 255 for each in value):
        quotes = "; put #rrggbb in quotes, for # begins a comment" if value is None else ""
        raise _MistakeError(
            f'{where}: expected a colour [r, g, b] of bytes or "#rrggbb", got {value!r}{quotes}'
        )
    return value[0], value[1], value[2]


def _image(value: Any) -> tuple[tuple[int, ...] | None, tuple[float, float] | None]:
    if value is None:
        return None, None
    image = _mapping(value, IMAGE_KEYS, "image")
    channels, values = image.get("channels"), image.get("range")
    if channels is not None and (
        not isinstance(channels, list)
        or len(channels) not in (1, 3)
        or not all(type(each) is int and each >= 1 for each in channels)
    ):
        raise _MistakeError(f"image: expected 1 or 3 channels, counted from 1, got {channels!r}")
    if values is not None and (
        not isinstance(values, list)
        or len(values) != 2
        or not all(type(each) in (int, float) for each in values)
        or not values[0] < values[1]
    ):
        raise _MistakeError(f"image: expected a range [black, white], got {values!r}")
    return (
        None if channels is None else tuple(channels),
        None if values is None else (float(values[0]), float(values[1])),
    )


def _suffix(top: dict[str, Any], key: str) -> str:
    value = top.get(key, "")
    if not isinstance(value, str):
        raise _MistakeError(f"expected text under {key}, got {value!r}")
    return value


def _number(colour: Colour) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def _default_colour(place: int) -> Colour:
    """A colour for each class, far from those of its neighbours: bits of the place, as in Pascal VOC."""
    r = g = b = 0
    number = place + 1
    for bit in range(7, -1, -1):
        r |= (number & 1) << bit
        g |= (number >> 1 & 1) << bit
        b |= (number >> 2 & 1) << bit
        number >>= 3
    return r, g, b
