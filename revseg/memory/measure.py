"""What a function takes of memory, counted in bytes.

Resident memory misleads: a heap that fragments looks like a leak, and one that keeps its pages
hides a saving. So we ask torch's own allocator. On a CPU the profiler writes one event for every
block that is allocated or freed; added up in time order they give the peak to the byte, the same
figure each time and on every machine. On a GPU the caching allocator keeps the peak itself.

`peak_bytes` says what a training step needs, `saved_bytes` what the forward pass leaves behind
for the backward pass, which is the part that a reversible network does without.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _enable_profiler, _profiler_enabled
from torch._C._profiler import RecordScope, _EventType
from torch.autograd import profiler
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

_START = "revseg.memory: start of the count"
_ANOTHER = "expected a function that runs no profiler, got one that does: torch has only one"


def peak_bytes(
    fn: Callable[[], object],
    device: str | torch.device = "cpu",
    *,
    before: Callable[[], object] | None = None,
) -> int:
    """The most bytes that were allocated at one time while `fn()` ran, beyond those at its start.

    The figure is exact for the tensors of a process: on a CPU no byte is rounded, on a GPU the
    allocator rounds each block up (to 512 bytes). What libraries take for themselves is not seen
    (oneDNN, the CUDA context); with convolutions on a CPU that was under 0.5 MiB.

    Args:
        fn: The function to measure. Its result stays alive until the count ends, then is dropped.
        device: The device whose memory is counted, a CPU or a CUDA device.
        before: Runs first and is not counted. Pass `fn` itself where the first call differs from
            the later ones (gradients and optimizer state that are created once, workspaces of
            cuBLAS and cuDNN). Its result is dropped before the count begins.

    Returns:
        The peak in bytes, at least 0.

    Raises:
        ValueError: If the device is neither a CPU nor a CUDA device.
        RuntimeError: On a CPU, if a profiler is running already, or if `fn` runs one.

    Memory:
        The CPU allocator knows the size of a block only if it saw the block being allocated. What
        `before` allocates and `fn` frees is subtracted; a block from before the call is not, on a
        CPU, so that there the result is an upper bound for a function that frees such blocks
        (torch then prints "Memory block of unknown size was allocated before the profiling
        started"). Threads of autograd are counted; a thread that `fn` starts itself is not.
    """
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected a device of type cpu or cuda, got {device}")
    gc.collect()  # else garbage of the caller could be freed halfway, at another moment each time
    if device.type == "cuda":
        return _peak_bytes_cuda(fn, device, before)
    return _peak_bytes_cpu(fn, before)


def is_countable(device: str | torch.device) -> bool:
    """Whether `peak_bytes` can count now: on a CPU no other profiler may run."""
    return torch.device(device).type == "cuda" or not _profiler_enabled()


def saved_bytes(fn: Callable[[], object]) -> int:
    """Bytes that autograd saves for the backward pass while `fn()` runs.

    Each storage counts once and in full, however many views of it are saved and however long it
    lives. Parameters do not count, they exist anyway; inputs count if they are saved. Let `fn` be
    a forward pass: in a backward pass the tensors of a recomputation would be counted too. The
    figure does not depend on the machine; fake and meta tensors have the same.

    Args:
        fn: The function to measure. Its result is dropped.

    Returns:
        The saved bytes, on all devices together. Tensors that a function of autograd keeps as
        attributes, past `save_for_backward`, are not seen.
    """
    sizes: dict[StorageWeakRef, int] = {}  # weak: kept alive, storages could not be freed as usual
    parameters: set[StorageWeakRef] = set()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        sizes[key] = storage.nbytes()
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            parameters.add(key)
        return tensor if tensor.is_leaf else tensor.detach()  # an output would keep itself alive

    with saved_tensors_hooks(note, lambda tensor: tensor):
        fn()
    return sum(size for key, size in sizes.items() if key not in parameters)


def _peak_bytes_cpu(fn: Callable[[], object], before: Callable[[], object] | None) -> int:
    """The peak by the events of the profiler."""
    if _profiler_enabled():
        raise RuntimeError("expected no running profiler, got one: peak_bytes uses the only one torch has")
    with _BlocksAlone(profile_memory=True) as profile:
        if before is not None:
            before()
            gc.collect()
        with profiler.record_function(_START):
            pass
        result = fn()
    del result

    assert profile.kineto_results is not None
    events = sorted(_flat(profile.kineto_results.experimental_event_tree()), key=lambda e: e.start_time_ns)
    if not any(event.name == _START for event in events):
        raise RuntimeError(_ANOTHER)
    return _peak_of_events(events)


class _BlocksAlone(profiler.profile):
    """The profiler without the operations of torch: they are nine of ten events, and most of its time."""

    def _start_trace(self) -> None:
        self.entered = True
        _enable_profiler(self.config(), self.kineto_activities, {RecordScope.USER_SCOPE})  # type: ignore[no-untyped-call, call-arg]

    def __exit__(self, *error: object) -> Any:
        if not _profiler_enabled():  # another one has ended it, and torch 2.8 would say so in its own words
            raise RuntimeError(_ANOTHER)
        return super().__exit__(*error)  # type: ignore[no-untyped-call]


def _peak_of_events(events: Iterable[Any]) -> int:
    """The highest sum of the blocks allocated and not yet freed, from the mark on.

    A freed block is looked up by its address. The size in the event will not do: the allocator
    takes it from the last profile that saw this address, and that block may be long gone.
    """
    blocks: dict[int, int] = {}  # address to bytes
    now = peak = 0
    for event in events:
        if event.tag != _EventType.Allocation:
            if event.name == _START:
                now = peak = 0
            continue
        fields = event.extra_fields
        if fields.device.type != "cpu":
            continue
        address, size = fields.ptr, fields.alloc_size
        if size > 0:
            blocks[address] = size
            now += size
        else:
            now -= blocks.pop(address, 0)
        peak = max(peak, now)
    return peak


def _flat(events: Iterable[Any]) -> Iterator[Any]:
    """The events of a tree, parents before children."""
    stack = [*events][::-1]
    while stack:
        event = stack.pop()
        yield event
        stack.extend(event.children[::-1])


def _peak_bytes_cuda(
    fn: Callable[[], object], device: torch.device, before: Callable[[], object] | None
) -> int:
    """The peak that the caching allocator keeps."""
    if before is not None:
        before()
        gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    result = fn()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - start
    del result
    return peak
