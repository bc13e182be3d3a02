"""A run that is killed with -9 and resumed, again and again, ends as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


LONG = pytest.mark.skipif("REVSEG_SLOW" not in os.environ, reason="takes ten minutes: REVSEG_SLOW=1 runs it")


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=[pytest.mark.slow, LONG])])
def test_killed_and_resumed_runs_equal_the_straight_one_to_the_bit(kills, tmp_path):
    result = subprocess.run(
        [sys.executable, HERE / "kills.py", tmp_path, str(kills), "1"],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "bitwise equal" in result.stdout
