"""Weights under the names of a paper's official code, given our names.

A network's `from_official` is a table of rules: a pattern that matches a whole official name, and
the name that we have for it.
"""

import re
from collections.abc import Mapping

from torch import Tensor


def renamed(state: Mapping[str, Tensor], rules: Mapping[str, str]) -> dict[str, Tensor]:
    r"""The same tensors under our names.

    Args:
        state: Tensors by official name, with or without a leading "module.".
        rules: Regular expressions for whole official names, to ours with groups as in `\1`.

    Returns:
        Tensors by our names, in the order of `state`.

    Raises:
        ValueError: If no rule matches a name.
    """
    return {_our_name(name, rules): value for name, value in state.items()}


def _our_name(name: str, rules: Mapping[str, str]) -> str:
    for pattern, ours in rules.items():
        match = re.fullmatch(rf"(?:module\.)?{pattern}", name)
        if match is not None:
            return match.expand(ours)
    raise ValueError(f"unknown name {name!r} among the official weights")
