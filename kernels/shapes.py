"""Tensors that are shapes alone: on the meta device, or fake.

Memory is predicted with such tensors. Whatever goes block by block need then go through one block
only, and whatever looks at values must not.
"""

from torch import Tensor


def has_values(x: Tensor) -> bool:
    """False for tensors that are shapes alone."""
    return not x.is_meta and getattr(x, "fake_mode", None) is None
