"""Predicted steps of VNet at each memory level: beside the measured, at sizes that no machine holds, and below their goals."""

import pytest

from benchmarks.questions.memory_levels import CASES, training_step
from revseg.memory import peak_bytes, predicted_peak_bytes


@pytest.mark.parametrize("case", ["plain", "fastest", "balanced", "lowest"])
def test_every_memory_level_is_predicted(case):
    size = (2, 256, 512)
    predicted = predicted_peak_bytes(lambda: training_step(case, size, values=False))
    assert predicted == pytest.approx(peak_bytes(training_step(case, size)), rel=0.03)


@pytest.mark.parametrize("case", ["lowest", "lowest, lossless, bfloat16"])
def test_a_single_image_is_predicted(case):
    """Where copies inside of convolutions would weigh most."""
    size = (1, 512, 1024)
    predicted = predicted_peak_bytes(lambda: training_step(case, size, values=False))
    assert predicted == pytest.approx(peak_bytes(training_step(case, size)), rel=0.03)


def test_sizes_that_no_machine_holds():
    def peak(height, width):
        return predicted_peak_bytes(lambda: training_step("balanced", (4, height, width), values=False))

    assert peak(4096, 4096) == pytest.approx(8 * peak(1024, 2048), rel=0.03)  # 6 GiB


def goal_of(case):
    """What a step at full size is held to, MiB. By bands it is nearly what is wanted: docs/bands.md says where its floor is."""
    return {"least": 232, "least, lossless, bfloat16": 165}.get(case, CASES[case][3])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if case.startswith("least") else ())  # thousands of bands
        for case in CASES
        if CASES[case][3] is not None
    ],
)
def test_goals_are_predicted(case):
    """The table of the memory levels, at full size and without its memory."""
    predicted = predicted_peak_bytes(lambda: training_step(case, (4, 1024, 2048), values=False))
    assert predicted / 2**20 < goal_of(case)
