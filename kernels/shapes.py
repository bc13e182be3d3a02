"""Tensors that are shapes alone: on the meta device, or fake.

Memory is predicted with such tensors. Whatever goes block by block need then go through one block
only, and whatever looks at values must not.
"""

import torch
from torch import Tensor

_FAKE = torch._C._TorchDispatchModeKey.FAKE


def has_values(x: Tensor) -> bool:
    """False for tensors that are shapes alone, and for others where all that is made of them would be: labels that a loss holds."""
    alone = x.is_meta or getattr(x, "fake_mode", None) is not None
    return not alone and torch._C._get_dispatch_mode(_FAKE) is None
