"""The settings by which kernels are chosen, which must be the same in both runs of a function for the same bits."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch

from revseg.engine.drift import InversionError

# Settings, as attributes of torch, by which kernels are chosen. Not every torch has all of them, and
# some refuse to be read once their newer names were set; those are then in the list too.
_SETTINGS = (
    "are_deterministic_algorithms_enabled",
    "get_float32_matmul_precision",
    "backends.fp32_precision",
    "backends.mkldnn.enabled",
    "backends.mkldnn.deterministic",
    "backends.mkldnn.conv.fp32_precision",
    "backends.mkldnn.matmul.fp32_precision",
    "backends.cuda.flash_sdp_enabled",  # the CPU's attention obeys these as well
    "backends.cuda.mem_efficient_sdp_enabled",
    "backends.cuda.math_sdp_enabled",
)
_CPU_SETTINGS = ("get_num_threads",)
_GPU_SETTINGS = (
    "backends.cudnn.enabled",
    "backends.cudnn.deterministic",
    "backends.cudnn.allow_tf32",
    "backends.cudnn.conv.fp32_precision",
    "backends.cuda.matmul.fp32_precision",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "backends.cuda.cudnn_sdp_enabled",
)


def conditions(device: torch.device) -> dict[str, Any]:
    """The settings that must be the same in the forward and in the backward pass.

    Raises:
        RuntimeError: If kernels are chosen by timing, so that the second run may get another one.
    """
    if device.type == "cuda" and torch.backends.cudnn.benchmark:
        raise RuntimeError(
            "exact inversion needs the same kernels in both passes, and torch.backends.cudnn.benchmark "
            "may choose others; set it to False"
        )
    names = _SETTINGS + (_CPU_SETTINGS if device.type == "cpu" else _GPU_SETTINGS)
    return {name: _setting(name) for name in names}


def check_conditions(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise if a setting has changed since the forward pass.

    Raises:
        InversionError: Naming the setting and its two values.
    """
    for name, value in then.items():
        if None not in (value, now[name]) and now[name] != value:
            raise InversionError(
                f"torch.{name} was {value} in the forward pass and is {now[name]} in the backward pass; "
                "exact inversion needs the same kernels in both"
            )


def _setting(name: str) -> Any:
    """The value of a setting; None where this torch does not have it or will not tell."""
    try:
        value = attrgetter(name)(torch)
        return value() if callable(value) else value
    except (AttributeError, AssertionError, RuntimeError):
        return None
