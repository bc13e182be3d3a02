"""One process at a time writes to the folder of a run.

The lock is the system's, on the file .lock: it ends with the process, however that ends. It is a
POSIX lock of records, which processes that load samples do not inherit.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_held: set[Path] = set()  # by this process, which the system would let lock a file twice


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder of a run.

    Raises:
        ValueError: If another run holds it.
    """
    path = (folder / ".lock").resolve()
    if path in _held:
        raise ValueError(
            f"another run of this process is writing to {folder}: wait for it, or choose another --out"
        )
    with open(path, "a+", encoding="utf-8") as file:
        if not _lock(file.fileno()):
            file.seek(0)
            holder = file.read().strip() or "of unknown number"
            raise ValueError(
                f"another process ({holder}) is writing to {folder}: wait for it, or choose another --out"
            )
        _held.add(path)
        try:
            with suppress(OSError):  # a full disk: whoever is refused learns no number then
                file.truncate(0)
                os.write(file.fileno(), str(os.getpid()).encode())
            yield
        finally:
            _held.discard(path)


def _lock(handle: int) -> bool:
    """Takes the lock of an open file; False if another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
