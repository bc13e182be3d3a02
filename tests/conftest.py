"""Empty memory is NaN during tests, so that reading before writing shows."""

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "revseg",
    deadline=None,
    derandomize=True,  # a red run stays red
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("revseg")
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
