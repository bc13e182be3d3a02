"""All kernels, found by the names of their files.

The contract tests, `revseg doctor`, the benchmarks and what compiles ahead of time find an operation here: its file
holds function, reference and example inputs, and names them in `KERNELS`.
"""

from collections.abc import Iterable
from importlib import import_module

from revseg.kernels.verify import Kernel

OPERATIONS = (
    "revseg.kernels.batch_statistics.op",
    "revseg.kernels.running_statistics.op",
    "revseg.kernels.bn_act.op",
    "revseg.kernels.bn_act_backward.op",
    "revseg.kernels.asymmetric_conv.op",
    "revseg.kernels.sum_of_pools.op",
    "revseg.kernels.upsample_argmax.op",
    "revseg.kernels.upsample_cross_entropy.op",
    "revseg.kernels.relaid.op",
)


def kernels_of(modules: Iterable[str]) -> dict[str, Kernel]:
    """The kernels of these modules by their names, in order."""
    return {kernel.name: kernel for module in modules for kernel in import_module(module).KERNELS}


KERNELS = kernels_of(OPERATIONS)
