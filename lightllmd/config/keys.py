"""API keys: the files that hold them, and what is kept of them. Their content is configuration as much as their paths.

The supervisor reads the files, with the configuration and at each reload; api workers get digests and never look at a
file, so that no two of them disagree, whatever became of the files since.
"""

from __future__ import annotations

import hashlib
import os
import stat

import msgspec

from lightllmd.config.files import read_bytes, refusal
from lightllmd.errors import show

MAX_FILE_BYTES = 1 << 20


class KeyDigests(msgspec.Struct, frozen=True):
    """SHA-256 of each key, in hexadecimal. Where there are none, none is asked for."""

    requests: list[str] = []
    metrics: list[str] | None = None  # of /metrics; None: as `requests`


def digests(path: str) -> list[str]:
    """One key a line; blank lines and lines that begin with # are skipped. Raises ValueError, which says why in words,
    for a file that can't be read or has no key."""
    try:
        text = read_bytes(path, MAX_FILE_BYTES).decode("utf-8-sig")  # an editor's byte order mark is no part of a key
    except OSError as failure:
        raise ValueError(f"{show(path)} {refusal(failure)}") from None
    except UnicodeDecodeError as failure:
        raise ValueError(f"{show(path)} can't be read: byte {failure.start} is not valid UTF-8") from None
    keys = [key for line in text.splitlines() if (key := line.strip()) and not key.startswith("#")]
    if not keys:
        raise ValueError(f"{show(path)} has no key, so that no client could enter")
    return [hashlib.sha256(key.encode()).hexdigest() for key in keys]


def exposed(path: str) -> str:
    """What is wrong with who may read or write the file; empty: nothing is."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return ""
    if not mode & (stat.S_IROTH | stat.S_IWOTH):
        return ""
    may = "write" if mode & stat.S_IWOTH else "read"
    return f"every user of this host may {may} the keys in {path}: chmod o-rwx {path}"
