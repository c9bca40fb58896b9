"""A table of named keys as a file that keys are added to and taken out of: all at once or not at all, by one at a time,
and with comments and other entries as they were."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import secrets
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime

from lightllmd.config import keys
from lightllmd.config.document import parse_text
from lightllmd.config.files import read_bytes, refusal
from lightllmd.config.keys import TABLE, ApiKey, KeysInvalid
from lightllmd.config.setting import fields
from lightllmd.errors import ConfigInvalid, Problem

MODE = 0o640  # of a new file
GROUP = "lightllmd"  # of the service that the Debian package installs
_PREFIX = "sk-"  # what clients and scanners for secrets take for a key
_BYTES = 32  # of randomness
_HEAD = "# API keys of lightllmd, as hashes. lightllmctl key add, list and revoke; in force within seconds.\n"


def new_key() -> str:
    """256 random bits, in letters that need no quoting anywhere."""
    return _PREFIX + secrets.token_urlsafe(_BYTES)


def read(path: str) -> list[ApiKey]:
    """The keys of a table; none where there is no file. Raises ConfigInvalid."""
    return _checked(path, _content(path))


def add(path: str, key: ApiKey) -> None:
    """Adds an entry, to a new file where there is none. Raises ConfigInvalid, with the file as it was."""
    with _changing(path) as real:
        body = _content(real)
        if any(known.name == key.name for known in _checked(real, body)):
            raise _refused(
                path, f"{TABLE}.{key.name}", "there is such a key already: revoke it first, or take another name"
            )
        text = body.decode("utf-8-sig") or _HEAD
        if text and not text.endswith("\n"):
            text += "\n"
        _write(real, f"{text}\n{_entry(key)}")


def revoke(path: str, name: str) -> None:
    """Takes an entry out. Raises ConfigInvalid, with the file as it was."""
    with _changing(path) as real:
        body = _content(real)
        before = _checked(real, body)
        if all(known.name != name for known in before):
            known = ", ".join(key.name for key in before)
            raise _refused(path, f"{TABLE}.{name}", f"there is no such key; known: {known or 'none'}")
        text = _without(path, body.decode("utf-8-sig"), name)
        if _checked(real, text.encode()) != [key for key in before if key.name != name]:
            raise _refused(path, f"{TABLE}.{name}", "its entry is not one table of its own: take it out by hand")
        _write(real, text)


def _without(path: str, text: str, name: str) -> str:
    """The entry's lines are those from its header to the next one, or its one line in [keys]."""
    line = parse_text(path, text.encode()).lines.get((TABLE, name), 0) - 1
    lines = text.splitlines(keepends=True)
    end = line + 1
    if lines[line].lstrip().startswith("["):
        while end < len(lines) and not lines[end].lstrip().startswith(("[", "#")):
            end += 1
    kept = [*lines[:line], *lines[end:]]
    # An empty file would be a list without keys, which is refused; that no client may enter is what is meant.
    return "".join(kept) if keys.is_table("".join(kept).encode()) else "".join([*kept, f"[{TABLE}]\n"])


def _entry(key: ApiKey) -> str:
    header = key.name if all(letter.isalnum() or letter in "_-" for letter in key.name) else f'"{key.name}"'
    lines = [f"[{TABLE}.{header}]"]
    if key.expires is not None:
        lines.append(f"expires = {moment(key.expires)}")
    for field in fields(ApiKey):
        value = getattr(key, field.name)
        if value != field.default:
            lines.append(f"{field.name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def moment(when: float) -> str:
    """Unix seconds as TOML has them."""
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _toml(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


# --- the file -----------------------------------------------------------------------------------------------------


def _content(path: str) -> bytes:
    try:
        return read_bytes(path, keys.MAX_FILE_BYTES)
    except FileNotFoundError:
        return b""
    except OSError as failure:
        raise _refused(path, "", refusal(failure)) from None


def _checked(path: str, body: bytes) -> list[ApiKey]:
    """Raises ConfigInvalid for a list of keys, and for a table with faults."""
    if not body.strip():
        return []
    if not keys.is_table(body):
        if _is_blank(body):
            return []
        raise _refused(path, "", f"is a list of keys, one a line: name another file for keys in a [{TABLE}.NAME] table")
    try:
        return keys.table(path, body)
    except KeysInvalid as fault:
        raise ConfigInvalid(fault.problems or [Problem("", fault.message, path)]) from None


def _is_blank(body: bytes) -> bool:
    lines = (line.strip() for line in body.splitlines())
    return all(not line or line.startswith(b"#") for line in lines)


def _refused(path: str, key: str, message: str) -> ConfigInvalid:
    return ConfigInvalid([Problem(key, message, path)])


@contextlib.contextmanager
def _changing(path: str) -> Iterator[str]:
    """The file itself where `path` is a link, which stays one. Others who change it wait."""
    real = os.path.realpath(path)
    try:
        folder = os.open(os.path.dirname(real), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as failure:
        raise _refused(path, "", f"its folder {refusal(failure)}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield real
        os.fsync(folder)
    except OSError as failure:
        raise _refused(path, "", f"can't be written: {failure.strerror}") from None
    finally:
        os.close(folder)


def _readers(folder: str) -> int:
    """The group that may read a file that root makes: the folder's or, where that is root's, the service's own."""
    group = os.stat(folder).st_gid
    with contextlib.suppress(KeyError):
        return group or grp.getgrnam(GROUP).gr_gid
    return group


def _write(path: str, text: str) -> None:
    """Under its name there is the old file or the new one, whole. Its owner and mode stay as they were; a new one may
    be read by the daemon's group. Raises OSError."""
    folder = os.path.dirname(path)
    try:
        found = os.stat(path)
        mode, owner, group = found.st_mode & 0o777, found.st_uid, found.st_gid
    except FileNotFoundError:
        mode, owner, group = MODE, -1, _readers(folder) if os.geteuid() == 0 else -1
    fd, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            if os.geteuid() == 0:
                os.fchown(fd, owner, group)
            os.fchmod(fd, mode)
            file.flush()
            os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
