"""One process at a time writes."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Raises ValueError if another process is in here with this path.

    (Not noticed on Windows, nor on file systems without locks.)
    """
    if fcntl is None:
        yield
        return
    lock = Path(f"{path}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed, or the process is killed
            if not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                raise BlockingIOError  # its owner removed it meanwhile: ours is a lock on a file without a name
        except (BlockingIOError, FileNotFoundError):
            raise ValueError(f"{path} is being written by another process: wait for it or stop it") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def taking_turns(directory: Path) -> Iterator[None]:
    """Waits while another process is in here with this directory. (Not on Windows, nor without locks.)"""
    if fcntl is None:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)  # until it is unlocked, or the process killed
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # also for a child that was forked meanwhile
        os.close(handle)
