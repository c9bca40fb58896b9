"""Whether the files that a plan was made from are still the same: what is kept of each, and how it is compared.

A generation that starts again reads the model's files again. Others in their place would continue a stream with another
model, so each reader compares first. A file that only was touched, or copied back, is the same one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence

import msgspec

from lightllmd.config.files import open_regular
from lightllmd.errors import ModelChanged

WHOLE = 128 << 20  # bytes up to which a file's whole content is compared
_HEADER = 1 << 20  # bytes of a larger one that are, at most; then its time of modification counts too
_CHUNK = 1 << 20
ABSENT = -1


class Stamp(msgspec.Struct, frozen=True):
    """One file as it was. `size` is ABSENT where there was none."""

    path: str
    size: int
    mtime_ns: int = 0
    ctime_ns: int = 0
    inode: int = 0
    digest: str = ""
    most: int = WHOLE  # bytes up to which its whole content is in the digest

    @property
    def content(self) -> tuple[str, int, str, int]:
        """Equal for equal files, as far as it is known."""
        return self.path, self.size, self.digest, self.mtime_ns if self.size > self.most else 0


def stamps_of(paths: Sequence[str]) -> list[Stamp]:
    """Of files that are compared together: as many bytes of all of them as otherwise of one. Raises OSError."""
    return [stamp(path, WHOLE // len(paths)) for path in paths]


def stamp(path: str, most: int | None = None) -> Stamp:
    """`most`: bytes up to which a file's whole content is compared, else WHOLE. Raises OSError for what is no file that
    can be read."""
    most = WHOLE if most is None else most
    try:
        fd = open_regular(path)
    except FileNotFoundError:
        return Stamp(path, ABSENT, most=most)
    try:
        found = os.fstat(fd)
        digest = _digest(fd, found.st_size if found.st_size <= most else min(_HEADER, most))
        return Stamp(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, digest, most)
    finally:
        os.close(fd)


def _digest(fd: int, size: int) -> str:
    digest = hashlib.sha256()
    while size > 0 and (chunk := os.read(fd, min(_CHUNK, size))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def touched(stamps: Iterable[Stamp]) -> bool:
    """Whether any may have changed; costs a stat each."""
    return any(not _as_it_was(one) for one in stamps)


def _as_it_was(one: Stamp) -> bool:
    try:
        found = os.stat(one.path)
    except FileNotFoundError:
        return one.size == ABSENT
    except OSError:
        return False
    before = one.size, one.mtime_ns, one.ctime_ns, one.inode
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino) == before


def changed_files(stamps: Iterable[Stamp]) -> list[str]:
    """Paths of the files that are not the same any more, or can't be read."""
    return [one.path for one in stamps if not (_as_it_was(one) or _same_content(one))]


def _same_content(before: Stamp) -> bool:
    try:
        return stamp(before.path, before.most).content == before.content
    except OSError:
        return False


def require_unchanged(stamps: Iterable[Stamp]) -> None:
    """Raises ModelChanged, which names the file."""
    for before in stamps:
        if _as_it_was(before):
            continue
        try:
            now = stamp(before.path, before.most)
        except OSError as refused:
            raise _changed(before.path, f"it can't be read: {refused.strerror}") from None
        if now.content != before.content:
            raise _changed(before.path, _difference(before, now))


def _difference(before: Stamp, now: Stamp) -> str:
    if now.size == ABSENT:
        return "it is gone"
    if before.size == ABSENT:
        return "it was not there"
    return f"{before.size} -> {now.size} bytes" if before.size != now.size else "its content is another"


def _changed(path: str, how: str) -> ModelChanged:
    return ModelChanged(
        f"{path} changed since the model was planned ({how}): put it back, or take up what is there "
        "(lightllmctl reload)"
    )


def differing(before: Sequence[Stamp], now: Sequence[Stamp]) -> list[str]:
    """Paths of files that are not the same in both."""
    old, new = {one.path: one.content for one in before}, {one.path: one.content for one in now}
    return [path for path in dict.fromkeys([*old, *new]) if old.get(path) != new.get(path)]
