"""Weights from the official code of a paper: its names in place of ours.

A model's `from_official` knows which of its modules is which of theirs; what a module calls its
tensors (weight, bias, running_mean, ...) is PyTorch's, and the same everywhere.
"""

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
            raise ValueError(f"expected names of the official network, got {name!r}")
        ours[f"{modules[module]}.{tensor}"] = value
    return ours
