"""Reading and writing files: replaced atomically, appended durably, and every failure of the file system as one sentence.

A reader of a file that `write_atomically` replaces sees the old content or the new one. The temporary has one name per file, so
that what a killed process left behind is overwritten by the next write and does not accumulate; an advisory lock on it keeps two
writers of the same file apart.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mpsearch.errors import InputError

LOCK = ".lock"

# errno -> (reason, what to do)
_REASONS = {
    errno.ENOSPC: ("no space is left on the disk", "Free some space, then run the command again"),
    errno.EDQUOT: ("the disk quota is used up", "Free some space, then run the command again"),
    errno.EFBIG: (
        "the file would exceed the largest size that the file system or this process may write",
        "Raise the limit (ulimit -f), or use another file system, then run the command again",
    ),
    errno.EROFS: ("the file system is read-only", "Make it writable, or give another folder"),
    errno.EACCES: ("permission is denied", "Change the permissions, or give another folder"),
    errno.EPERM: ("the operation is not permitted", "Change the permissions, or give another folder"),
    errno.ENOENT: ("the file or its folder does not exist (any more)", "Restore it, or start a new run"),
    errno.ESTALE: ("the file or its folder does not exist (any more)", "Restore it, or start a new run"),
    errno.ENOTDIR: ("a part of its path is not a folder", "Give another folder"),
    errno.EISDIR: ("it is a folder", "Move it out of the way"),
    errno.ELOOP: ("it is a symbolic link", "Remove the link"),
    errno.EIO: ("the disk reports an input/output error", "Check the disk, then run the command again"),
}


@contextmanager
def file_errors(path: Path | str, action: str = "written") -> Iterator[None]:
    """Turn an `OSError` inside the block into an `InputError` that names `path`, the reason and what to do."""
    try:
        yield
    except OSError as error:
        raise InputError(file_sentence(path, error, action)) from error


def file_sentence(path: Path | str, error: OSError, action: str = "written") -> str:
    """What failed, why, and what to do."""
    default = (os.strerror(error.errno) if error.errno else str(error), "Check the path and the disk")
    reason, remedy = _REASONS.get(error.errno or 0, default)
    return f"{path} cannot be {action}: {reason}. {remedy}."


def write_atomically(path: Path | str, data: bytes | str) -> None:
    """Replace the file at `path`; text is encoded as UTF-8.

    The data are on disk when this returns. The mode is 0666 less the umask. Where anything fails, the old file stays as it was
    and the temporary is removed; `InputError` where the file system is the cause.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.tmp")
    with file_errors(path):
        descriptor = _open_locked(temporary)
        try:
            os.ftruncate(descriptor, 0)
            _write_all(descriptor, content)
            os.fsync(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        finally:
            os.close(descriptor)
        _sync_folder(path.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """`folder`, made where it is absent, is this process's to write to while the block runs.

    Raises `InputError`, without having changed anything, where another process has it.
    """
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(folder / LOCK, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"Another process is at work in {folder}. Wait for it, or start a new run.") from None
        yield
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a process is at work in `folder` (`locked`)."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def append_durably(path: Path | str, data: bytes | str) -> None:
    """Append to the file at `path`, created where it is absent; the data are on disk when this returns.

    Where the file system refuses, the file is cut back to its old length and an `InputError` is raised.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    with file_errors(path):
        is_new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            length = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, content)
                os.fsync(descriptor)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, length)
                raise
        finally:
            os.close(descriptor)
        if is_new:
            _sync_folder(path.parent)


def read_regular(path: Path | str) -> bytes:
    """The content of a regular file; `InputError` where it is absent, unreadable, or a folder, pipe or device."""
    with file_errors(path, "read"):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would block
        with os.fdopen(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError(f"{path} is not a regular file. Put the original file back in its place.")
            return stream.read()


def _open_locked(temporary: Path) -> int:
    """A descriptor of the temporary, which no other process has until it is closed."""
    while True:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):  # another writer moved or removed it meanwhile
                if os.path.samestat(os.fstat(descriptor), os.lstat(temporary)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def _sync_folder(folder: Path) -> None:
    """Make a new or replaced name durable, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
