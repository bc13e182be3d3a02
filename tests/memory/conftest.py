"""What tests of rows by bands look at."""

import pytest

from revseg.memory import row_by_bands, run_again
from tests.memory.test_fit_bands import MANY


@pytest.fixture
def lengths(monkeypatch):
    """How many modules went by bands together, in each run."""
    monkeypatch.setattr(run_again, "BANDS", MANY)
    found, layers_of_row = [], row_by_bands.layers_of_row

    def noted(modules, x):
        modules = list(modules)
        found.append(len(modules))
        return layers_of_row(modules, x)

    monkeypatch.setattr(row_by_bands, "layers_of_row", noted)
    return found
