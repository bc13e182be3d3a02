"""Names of weights: from those of a paper's official code to ours."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

Rules = Sequence[tuple[str, str]]  # a pattern for the whole name there, a template for the name here


def renamed(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """The same weights by our names.

    Args:
        state: Weights by the official names, also with "module." before them.
        rules: The first one whose pattern matches is taken.

    Raises:
        ValueError: If no rule matches a name.
    """
    ours = {}
    for name, value in state.items():
        matches = ((re.fullmatch(pattern, name.removeprefix("module.")), new) for pattern, new in rules)
        found = next((match.expand(new) for match, new in matches if match), None)
        if found is None:
            raise ValueError(f"unknown weight {name!r}: the official code has no such name")
        ours[found] = value
    return ours
