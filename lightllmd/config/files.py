"""Files that others write (configuration, keys, model folders), opened without waiting and read with a bound.

A path may name anything: a FIFO that never has a writer, /dev/zero, a tape, a file under /proc that blocks or has no
end. Whatever is no regular file is refused before it is opened, since opening alone may wait or have an effect; a read
that would wait fails, and none goes on past its limit. Every refusal is an OSError whose `strerror` says why in words.
"""

from __future__ import annotations

import errno
import os
import stat

StrPath = str | os.PathLike[str]
_CHUNK = 1 << 20  # bytes

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: StrPath) -> int:
    """A descriptor to read from; the caller closes it. Raises OSError (FileNotFoundError where nothing is there)."""
    try:
        _require_regular(path, os.stat(path))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except ValueError as error:  # a NUL in the path
        raise OSError(errno.EINVAL, str(error), path) from None
    try:
        _require_regular(path, os.fstat(fd))  # it may have been replaced in between
    except OSError:
        os.close(fd)
        raise
    return fd


def refusal(error: OSError | ValueError) -> str:
    """Why a file could not be read, in words that follow its name."""
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    return f"can't be read: {error.strerror if isinstance(error, OSError) else error}"


def read_bytes(path: StrPath, limit: int) -> bytes:
    """All of a regular file of at most `limit` bytes. Raises OSError."""
    fd = open_regular(path)
    try:
        if os.fstat(fd).st_size > limit:  # told before it is read; a file under /proc says 0 whatever it holds
            raise _too_large(path, limit)
        body = bytearray()
        while chunk := os.read(fd, min(_CHUNK, limit + 1 - len(body))):
            body += chunk
            if len(body) > limit:
                raise _too_large(path, limit)
    finally:
        os.close(fd)
    return bytes(body)


def _require_regular(path: StrPath, found: os.stat_result) -> None:
    if stat.S_ISREG(found.st_mode) or _is_null(found):
        return
    kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
    raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", path)


def _is_null(found: os.stat_result) -> bool:
    """/dev/null, the usual way to name an empty file."""
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 3)


def _too_large(path: StrPath, limit: int) -> OSError:
    return OSError(errno.EFBIG, f"it is larger than {limit} bytes", path)
