"""Kernels compile for GPUs that are not here, without spilling registers and within their shared memory.

A part of the cases of `python -m benchmarks measure compile_ahead`, chosen so that every kernel meets every GPU, and
every dtype, precision, layout and number of channels meets some. Two GPUs are left to `pytest -m slow`.
"""

import argparse
import os
from shutil import which

import pytest
import torch

from benchmarks import record, report
from benchmarks.ahead import TARGETS, compile_launches
from benchmarks.ahead_cases import DTYPES, LAYOUTS, OF_CLASSES, OPERATIONS, Case, all_cases
from benchmarks.questions import compile_ahead
from benchmarks.questions.compile_ahead import (
    SPILLS_KNOWN,
    compile_case,
    complaints,
    everything,
    kept_rows,
    key_of,
    names_of,
    summary,
)
from revseg.kernels.asymmetric_conv.op import OLDEST_TRITON
from revseg.kernels.dispatch import triton_version
from revseg.kernels.registry import KERNELS
from tests.kernels.scaling.op import example_inputs, scale

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="a process that interprets kernels compiles none"
)
OF_SPILLS = 3, 7  # the Triton whose spills are known (`SPILLS_KNOWN`)
targets = pytest.mark.parametrize("target", TARGETS)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Compiled here and now, not found from another day; tests share it, as many kernels are the same."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


# Kernels of another target or operation come from other code, so all of these; of dtypes, layouts and channels
# those that are used most, and here and there another. A convolution takes longest to compile: each of its kinds once.
COVERED = [
    *(Case(operation, 19, "bfloat16", "contiguous") for operation in OF_CLASSES),
    Case("batch_statistics", 32, "bfloat16"),
    Case("moved_statistics", 32, "float32", "contiguous"),
    Case("bn_act", 64, "float32", "contiguous"),
    Case("bn_act_backward", 16, "float16"),
    Case("sum_of_pools", 32, "float32", "contiguous"),
]
ONLY_HERE = {
    "sm_75": [Case("bn_act_backward", 128, "float32", "contiguous")],
    "sm_80": [Case("asymmetric_conv", 64, "bfloat16")],
    "sm_86": [Case("asymmetric_conv", 16, "float16")],
    "sm_90": [Case("asymmetric_conv", 64, "tf32"), Case("asymmetric_conv", 32, "float32")],
    "sm_100": [Case("asymmetric_conv", 64, "bfloat16"), Case("asymmetric_conv", 8, "tf32", "contiguous")],
    "gfx942": [
        Case("asymmetric_conv", 32, "bfloat16"),
        Case("bn_act", 8, "float16"),
        Case("batch_statistics", 128, "float32", "contiguous"),
    ],
}


# Between two neighbours that are always compiled for: their code is that of sm_80 and sm_90 but for its instructions.
LEFT_TO_SLOW = {"sm_86", "sm_100"}


@pytest.mark.parametrize(
    ("target", "operation"),
    [
        pytest.param(*each, marks=pytest.mark.slow if each[0] in LEFT_TO_SLOW else ())
        for each in sorted(everything())
    ],
)
def test_kernels_compile(target, operation):
    if operation == "asymmetric_conv" and triton_version() < OLDEST_TRITON:
        pytest.skip("with this Triton the convolution is that of PyTorch")
    cases = [case for case in (*COVERED, *ONLY_HERE[target]) if case.operation == operation]
    rows = [row for case in cases if case.runs_on(target) for row in compile_case(target, case)]
    assert rows
    if triton_version() != OF_SPILLS:  # how many there are depends on the version
        rows = [row | {"spills": 0} for row in rows]
    found = complaints([summary(cases, rows)])
    if any("ROCm linker" in complaint for complaint in found):
        pytest.skip("this Triton takes its linker for AMD's GPUs from ROCm, which is not installed")
    assert found == []


def test_the_part_covers_every_kind():
    cases = [*COVERED, *(case for more in ONLY_HERE.values() for case in more)]
    assert {case.operation for case in cases} == set(OPERATIONS)
    assert {case.numbers for case in cases} == {*DTYPES, "tf32"}
    assert {case.layout for case in cases} == set(LAYOUTS)
    assert {case.channels for case in cases} >= {8, 16, 32, 64, 128}
    assert set(cases) <= set(all_cases())


def test_every_kernel_of_the_registry_is_launched():
    files = {OPERATIONS[name].__name__.strip("_") for name in OPERATIONS}
    for name, kernel in KERNELS.items():
        launched = any(name.startswith(file) or file.startswith(name) for file in files)
        assert launched == kernel.has_triton, name


@targets
def test_a_launch_compiles_and_runs_nothing(target):
    if target.startswith("gfx") and triton_version() < (3, 5) and not which("ld.lld"):
        pytest.skip("this Triton takes its linker for AMD's GPUs from ROCm, which is not installed")
    x, factor = example_inputs("cpu", torch.float32)
    found = []
    (kernel,) = compile_launches(target, lambda: found.append(scale(x, factor)))
    assert kernel.kernel == "_scale_kernel"
    assert kernel.warps == 1
    assert 4 < kernel.registers < 64
    assert (kernel.spills, kernel.shared) == (0, 0)
    assert not found[0].any()
    torch.testing.assert_close(scale(x, factor), x * factor[:, None, None])  # and runs again afterwards


def test_spilled_registers_are_counted():
    from tests.kernels.scaling.gpu import scale_hungrily

    (kernel,) = compile_launches("sm_80", lambda: scale_hungrily(torch.ones(16384)))
    assert kernel.spills > 100


def kernel(**values):
    case = Case("bn_act", 32, "float16")._asdict()
    found = {"target": "sm_75", "kernel": "_bn_act_kernel", "registers": 64, "spills": 0, "shared": 0}
    return case | found | values


def row(*kernels):
    return summary([Case("bn_act", 32, "float16")], kernels)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (
            {"spills": 2},
            "bn_act for sm_75, float16, 32 channels, channels_last: _bn_act_kernel spills 2 times",
        ),
        ({"shared": 65537}, "bn_act for sm_75: a kernel takes 65537 bytes of 65536"),
        ({"error": "PTXASError: C7602"}, "PTXASError: C7602"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(values, complaint):
    (found,) = complaints([row(kernel()), row(kernel(), kernel(**values))])
    assert complaint in found


def test_known_spills_are_let_through(monkeypatch):
    monkeypatch.setitem(SPILLS_KNOWN, ("bn_act", "_bn_act_kernel", "sm_75"), (2, "for the test"))
    assert complaints([row(kernel(spills=2))]) == []
    assert complaints([row(kernel(spills=3))]) != []
    assert complaints([row(kernel(spills=2, kernel="_other_kernel"))]) != []


def test_a_case_that_does_not_compile_is_a_row(monkeypatch):
    def fails(maps):
        raise ValueError("no such thing")

    monkeypatch.setitem(OPERATIONS, "bn_act", fails)
    (found,) = compile_case("sm_90", Case("bn_act", 32, "float16"))
    assert found["error"] == "ValueError: no such thing"
    assert found["target"] == "sm_90"


def test_a_part_keeps_the_rows_of_the_others_and_the_table_counts(tmp_path):
    keys = [("sm_90", "bn_act"), ("sm_90", "sum_of_pools")]
    rows = []
    for spills, (target, operation) in enumerate(keys):
        cases = everything()[target, operation][:2]
        kernels = [
            kernel(**case._asdict(), target=target, registers=255, shared=1024, spills=spills)
            for case in cases
        ]
        rows.append(summary(cases, kernels))
    args = argparse.Namespace(out=tmp_path)
    path = record.write("compile_ahead", "?", rows, compile_ahead.settings(args), tmp_path)
    assert kept_rows(args, keys) == {}
    kept = kept_rows(args, keys[:1])
    assert list(kept) == keys[1:]
    assert rows[1].items() <= kept[keys[1]].items()
    assert kept[keys[1]]["commit"]
    text = report.readme(tmp_path)
    assert "| sm_90 | 4 | 0 | 2 | 1 (sum_of_pools, float32, 8 channels) | 255 | 1,024 | 232,448 |" in text
    assert "| sm_80 | 0 | 0 |" in text
    path.write_text(path.read_text().replace('"triton": "', '"triton": "0.'))
    with pytest.raises(ValueError, match="has rows of"):
        kept_rows(args, keys[:1])
    assert kept_rows(args, keys) == {}  # nothing of the file stays


def test_all_cases_were_compiled_and_nothing_is_wrong():
    """What the tests compile a part of; `python -m benchmarks measure compile_ahead` writes the file."""
    rows = record.read(record.RESULTS / "compile_ahead.jsonl")["rows"]
    assert complaints(rows) == []
    found = {key_of(row): row["cases"] for row in rows}
    assert found == {key: names_of(cases) for key, cases in everything().items()}
