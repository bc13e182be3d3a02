"""Every case of `benchmarks.micro.cases` by pytest-benchmark, ours and then its twin."""

import os

import pytest

from benchmarks.micro.cases import CASES, MAP, TOY, Maps


@pytest.mark.parametrize("way", ["ours", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_micro(benchmark, case, way):
    maps = Maps.of(TOY if os.environ.get("MICRO_TOY") == "1" else MAP)
    step = getattr(CASES[case](maps), way)
    benchmark.extra_info.update(case=case, way=way)
    benchmark.pedantic(step, rounds=int(os.environ.get("MICRO_ROUNDS", "20")), warmup_rounds=2, iterations=1)
