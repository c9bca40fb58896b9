"""Images in files of this host, below the one folder that the operator has named."""

from __future__ import annotations

import os
import stat
from urllib.parse import unquote, urlsplit

from lightllmd.errors import show
from lightllmd.visual.image_file import HeldBytes, ImageFile, ImageRefused, MemoryWriter

_READ = 1 << 20  # bytes
_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


def read(name: str, root: str, max_bytes: int, held: HeldBytes | None = None) -> ImageFile:
    """A copy of the file `name`: a file URL, or a path that is absolute or begins at `root`. For a thread.

    The way down is opened folder by folder and follows no symbolic link, so that nothing that changes meanwhile leads
    out of `root`; a FIFO or a device is not waited for. Raises ImageRefused.
    """
    if not root:
        raise ImageRefused("files of this host may not be named: [images] file_root is empty")
    parts = _below(_path(name), root)
    try:
        fd = _open(root, parts)
    except (OSError, ValueError):
        raise ImageRefused(f"there is no file {show(name)} below [images] file_root that can be read") from None
    try:
        return _copy(fd, name, max_bytes, held)
    finally:
        os.close(fd)


def _path(name: str) -> str:
    if name[:5].lower() != "file:":
        return name
    try:
        parts = urlsplit(name)
    except ValueError:
        raise ImageRefused(f"{show(name)} is no file URL") from None
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise ImageRefused(f"{show(name)} is no URL of a file of this host, such as file:///srv/images/a.png")
    return unquote(parts.path)


def _below(path: str, root: str) -> list[str]:
    """What leads from `root` to the file."""
    inside = path
    if path.startswith("/"):
        base = root.rstrip("/") + "/"
        inside = path.removeprefix(base) if path.startswith(base) else ""
    parts = [part for part in inside.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or inside.endswith("/"):
        raise ImageRefused(f"{show(path)} is no file below [images] file_root")
    return parts


def _open(root: str, parts: list[str]) -> int:
    """Raises OSError, and ValueError for a name with a zero byte."""
    here = os.open(root, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            below = os.open(part, _FOLDER, dir_fd=here)
            os.close(here)
            here = below
        return os.open(parts[-1], _FILE, dir_fd=here)
    finally:
        os.close(here)


def _copy(fd: int, name: str, max_bytes: int, held: HeldBytes | None) -> ImageFile:
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode):
        raise ImageRefused(f"{show(name)} is no regular file")
    with MemoryWriter(held) as out:
        while part := os.read(fd, _READ):
            out.write([part])
            if max(out.size, facts.st_size) > max_bytes:
                raise ImageRefused(f"{show(name)} has more than {max_bytes} bytes, [images] max_bytes")
        if not out.size:
            raise ImageRefused(f"{show(name)} is empty")
        return out.finish()
