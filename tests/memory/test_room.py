"""What a device has left, and errors that say that it has not."""

import pytest
import torch

from revseg.memory.room import free_bytes, is_memory_error


def test_errors_of_all_allocators_are_known():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    for error in (raised.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert is_memory_error(error)
    assert not is_memory_error(RuntimeError("shapes differ"))
    assert free_bytes(torch.device("cpu")) > 2**20
