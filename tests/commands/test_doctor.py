"""`revseg doctor` says what is here, and finds kernels that are wrong or fail."""

import sys
from dataclasses import replace

import pytest
import torch
import triton

from revseg.cli import main
from revseg.commands import doctor
from revseg.kernels import dispatch
from revseg.kernels.registry import KERNELS
from tests.kernels.scaling.op import SCALE, reference

DTYPE_NAMES = ("float32", "float16", "bfloat16")


@pytest.fixture
def run(monkeypatch, capsys):
    """The exit code of `revseg doctor --device cpu` on some kernels, and what it prints."""

    def run(**kernels):
        monkeypatch.setattr(doctor, "KERNELS", kernels)
        code = main(["doctor", "--device", "cpu"])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return code, printed.out, printed.err

    return run


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # an import fails, and no package is found
    dispatch.has_triton.cache_clear()
    yield
    monkeypatch.undo()
    dispatch.has_triton.cache_clear()


def lines(out, name):
    return [" ".join(line.split()) for line in out.splitlines() if line.startswith(name)]


def test_all_kernels_are_right_here(run):
    code, out, err = run(**KERNELS)
    assert (code, err) == (0, "")
    for name in KERNELS:
        assert len([line for line in lines(out, f"{name} ") if line.endswith(" right")]) == 3


def test_the_last_thing_printed_is_a_block_for_a_report(run):
    _, out, _ = run(scale=SCALE, broken=replace(SCALE, function=lambda *_: 1 / 0))
    table, block = out.split("For a report, paste this:\n\n")
    assert block.startswith("```text\nrevseg ")
    assert block.endswith("3 of 6 right\n```\n")
    for name in ("system", "python", "numpy", "torch", "triton", "device"):
        assert lines(block, name), name
    assert lines(block, "broken in bfloat16: ZeroDivisionError")
    assert not lines(table, "torch ")


def test_versions_and_settings_are_named(run, monkeypatch):
    monkeypatch.setenv("REVSEG_KERNELS", "0")
    _, out, _ = run(scale=SCALE)
    assert lines(out, "torch") == [f"torch {torch.__version__}"]
    assert lines(out, "triton") == [f"triton {triton.__version__}"]
    assert lines(out, "device") == [f"device cpu, {torch.get_num_threads()} threads"]
    assert lines(out, "REVSEG_KERNELS") == ["REVSEG_KERNELS 0: layers run as ordinary PyTorch modules"]


def test_a_machine_without_triton(run, no_triton):
    code, out, _ = run(**KERNELS)
    assert code == 0
    assert lines(out, "triton") == ["triton no Triton: the PyTorch path is used"]
    assert "Triton " not in out.split("Errors against")[1]


def test_a_triton_that_cannot_be_imported(run, monkeypatch):
    def broken(name):
        raise OSError("libtriton.so: cannot open shared object file\nmore lines")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    assert (
        doctor.triton_version() == "cannot be imported: OSError: libtriton.so: cannot open shared object file"
    )


def test_a_wrong_kernel_is_named(run):
    wrong = replace(SCALE, function=lambda x, factor: reference(x, factor) + (x.dtype == torch.float16))
    code, out, err = run(good=SCALE, bad=wrong)
    assert code == 1
    assert err == (
        "revseg: not right on cpu: bad in float16; REVSEG_KERNELS=0 in the environment trains without\n"
    )
    assert [line.split()[-1] for line in lines(out, "bad")] == ["right", "wrong", "right"]
    assert [line.split()[-1] for line in lines(out, "good")] == ["right"] * 3


def test_a_kernel_that_fails_is_named_and_the_next_one_is_checked(run):
    def fails(x, factor):
        raise RuntimeError("ptxas fatal: C7602\n" + "more\n" * 100)

    code, out, err = run(bad=replace(SCALE, function=fails), good=SCALE)
    assert code == 1
    assert "bad in float32, bad in float16, bad in bfloat16" in err
    assert lines(out, "bad in ") == [
        f"bad in {each}: RuntimeError: ptxas fatal: C7602" for each in DTYPE_NAMES
    ]
    assert [line.split()[-1] for line in lines(out, "bad  ")] == ["failed"] * 3
    assert [line.split()[-1] for line in lines(out, "good")] == ["right"] * 3


def test_a_device_that_is_not_there_is_one_sentence(capsys):
    assert main(["doctor", "--device", "cuda:99"]) == 2
    assert capsys.readouterr().err.startswith("revseg: no --device cuda:99 here")


def test_a_gpu_is_named_with_what_triton_compiles_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    expected = "cuda:0, NVIDIA H100, compute capability 9.0, CUDA 12.8"
    assert doctor.device_name(torch.device("cuda:0")) == expected
