"""Weights under the names of a paper's official code, given our names.

A network's `from_official` knows which of its modules is which of theirs, by a table of all modules
or by a table of patterns. What a module calls its tensors (weight, bias, running_mean, ...) is
PyTorch's, and the same everywhere.
"""

import re
from collections.abc import Mapping

from torch import Tensor


def renamed(state: Mapping[str, Tensor], modules: Mapping[str, str]) -> dict[str, Tensor]:
    """The state dict of an official network under our names.

    Args:
        state: Weights by official name, which may begin with "module." (`nn.DataParallel`'s prefix).
        modules: Our name of each module that has tensors, by its official name.

    Returns:
        The same tensors, for `load_state_dict`.

    Raises:
        ValueError: If a name is not one of the official network's; says the first one.
    """
    ours = {}
    for name, value in state.items():
        module, _, tensor = name.removeprefix("module.").rpartition(".")
        if module not in modules:
            raise _unknown(name)
        ours[f"{modules[module]}.{tensor}"] = value
    return ours


def renamed_by(state: Mapping[str, Tensor], rules: Mapping[str, str]) -> dict[str, Tensor]:
    r"""The same by patterns.

    Args:
        state: Weights by official name, which may begin with "module.".
        rules: Regular expressions for whole official names, to ours with groups as in `\1`.

    Raises:
        ValueError: If no rule matches a name.
    """
    return {_our_name(name, rules): value for name, value in state.items()}


def _our_name(name: str, rules: Mapping[str, str]) -> str:
    for pattern, ours in rules.items():
        match = re.fullmatch(rf"(?:module\.)?{pattern}", name)
        if match is not None:
            return match.expand(ours)
    raise _unknown(name)


def _unknown(name: str) -> ValueError:
    return ValueError(f"expected names of the official network, got {name!r}")
