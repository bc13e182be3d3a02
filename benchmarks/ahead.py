"""Compiling what is launched, for GPUs that are not there.

Inside of `compiled_for` a launch compiles its kernel for a target and runs nothing. Types, alignment and
constants are those of the real arguments, so what is looked at is what a user's GPU would be given.
All results are zeros. A process that interprets kernels (`TRITON_INTERPRET=1`) cannot compile any.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import KernelInterface
from triton.runtime.driver import driver

from revseg.ops import forced

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 wants it said
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        gpu: As Triton names it.
        shared: Bytes of shared memory that one program can have.
    """

    gpu: GPUTarget
    shared: int


TARGETS = {
    "sm_75": Target(GPUTarget("cuda", 75, 32), 64 << 10),
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99 << 10),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10),
}


@dataclass(frozen=True)
class Resources:
    """What a thread and a program of a compiled kernel take.

    Attributes:
        kernel: Its name.
        warps: Warps of a program.
        registers: Of a thread.
        spills: Instructions that move a register to memory or back; on AMD, registers that are spilled.
        shared: Bytes of shared memory of a program.
    """

    kernel: str
    warps: int
    registers: int
    spills: int
    shared: int

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


def compile_launches(name: str, call: Callable[[], object]) -> list[Resources]:
    """What the call launches, compiled for a target; each kernel once.

    Args:
        name: A key of `TARGETS`.
        call: Launches kernels on CPU tensors.
    """
    target = TARGETS[name]
    with compiled_for(name) as kernels:
        call()
    return [
        _of_cuda(kernel) if target.gpu.backend == "cuda" else _of_amd(kernel)
        for kernel in {kernel.hash: kernel for kernel in kernels}.values()
    ]


@contextmanager
def compiled_for(name: str) -> Iterator[list[Any]]:
    """Launches compile for a target and go into the list, in place of running."""
    kernels: list[Any] = []
    launch = KernelInterface.__getitem__

    def compile_instead(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: kernels.append(kernel.warmup(*args, grid=grid, **options))

    KernelInterface.__getitem__ = compile_instead
    driver.set_active(_NoGPU(name))
    try:
        with forced(), _zeros_for_empty_memory():
            yield kernels
    finally:
        KernelInterface.__getitem__ = launch
        driver._active = None  # to be asked for again; without a GPU `reset_active` finds none


@contextmanager
def _zeros_for_empty_memory() -> Iterator[None]:
    """What no kernel has written to holds zeros: host code may look at a result, such as the range of labels."""
    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(patch.object(owner, name, _zeroed(getattr(owner, name))))
        yield


def _zeroed(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, **options: function(*args, **options).zero_()


class _NoGPU:
    """The parts of a driver that compiling asks for."""

    def __init__(self, name: str) -> None:
        self.target = TARGETS[name].gpu
        self.device = list(TARGETS).index(name)  # kernels are kept by device, so each target is one

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def is_active(self) -> bool:
        return True


def _of_cuda(kernel: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    spills = len(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?:LDL|STL)\b", code, re.MULTILINE))
    return Resources(
        kernel.name, kernel.metadata.num_warps, int(registers[1]), spills, kernel.metadata.shared
    )


def _of_amd(kernel: Any) -> Resources:
    found = {
        name: int(re.findall(rf"\.{name}:\s*(\d+)", kernel.asm["amdgcn"])[0])
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    }
    spills = found["vgpr_spill_count"] + found["sgpr_spill_count"]
    return Resources(
        kernel.name, kernel.metadata.num_warps, found["vgpr_count"], spills, kernel.metadata.shared
    )


def _tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], check=True, capture_output=True, text=True).stdout
