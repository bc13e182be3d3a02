"""An amount of memory, as people write it."""

import re

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}{end}": 1000**n for n, letter in enumerate("KMGT", 1) for end in ("", "B")}
_UNITS |= {f"{letter}I{end}": 1024**n for n, letter in enumerate("KMGT", 1) for end in ("", "B")}


def bytes_of(budget: float | str) -> int:
    """The bytes of 10_000_000_000, "10GB", "800 MiB" or "1.5g".

    Raises:
        ValueError: If `budget` is no amount, or not more than nothing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", str(budget))
    size = 0 if found is None else int(float(found[1]) * _UNITS.get(found[2].upper(), 0))
    if size < 1:
        raise ValueError(f"expected a budget like 10GB or 800MiB, got {budget!r}")
    return size
