"""A device without float64, as those of Apple and some of Intel, made of this CPU.

Its tensors say that they are on `DEVICE` and hold their values in a tensor of the CPU. Inside of `Device` tensors can be
made there; one in float64 is refused, as is an operation on tensors of two devices. Those of the CPU itself are free.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy", 0)  # of the names that torch knows one whose gradients need no driver
_MOVES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class There(Tensor):
    """A tensor on the device."""

    values: Tensor

    @staticmethod
    def __new__(cls, values):
        if values.dtype == torch.float64:
            raise TypeError("this device has no float64")
        tensor = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        tensor.values = values
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Driver:
    """The module of the device's name in torch, as far as it is needed: `torch.lazy`."""

    class Event:
        def record(self):
            pass

        def query(self):
            return True

    get_rng_state = staticmethod(lambda device: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device: torch.set_rng_state(state))


class Device(TorchDispatchMode):
    """Where the device is there: calls that name it make tensors on it."""

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(
            True
        )  # torch.tensor(1, device=...) is then seen as a copy from the CPU
        return super().__enter__()

    def __exit__(self, *exception):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prims"):
            return func(*args, **kwargs)
        device = kwargs.get("device")
        if any(isinstance(x, There) for x in tree_leaves((args, kwargs))) or (
            device is not None and torch.device(device).type == DEVICE.type
        ):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _run(func, args, kwargs):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if func not in _MOVES and any(not isinstance(x, There) and x.ndim for x in tensors):
        raise RuntimeError(f"{func}: expected all tensors on one device")
    inner = {key: "cpu" if key == "device" else value for key, value in kwargs.items()}
    found = func(*tree_map(_values, args), **tree_map(_values, inner))
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu":
        return found
    found = tree_map(lambda x: There(x) if isinstance(x, Tensor) else x, found)
    return return_and_correct_aliasing(func, args, kwargs, found)


def _values(x):
    return x.values if isinstance(x, There) else x
