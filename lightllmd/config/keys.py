"""API keys: what is kept of them, and the files that hold them. Their content is configuration as much as their paths.

The supervisor reads the files, with the configuration and when they have changed; api workers get what it read and
never look at a file, so that no two of them disagree, whatever became of the files since.

A file is a list, one key a line, whose keys may do all; or a TOML table of named keys that holds their hashes alone:

    [keys.alice]
    sha256 = "5f3c…"                # of the key; the key itself is told once, by lightllmctl key add
    expires = 2027-01-01T00:00:00Z

Plain SHA-256 is right here: a made key has 256 random bits, so that none is found by trying, however fast the hash
is, and each request is checked within microseconds. A slow hash is for passwords, which people choose.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec

from lightllmd.config import check
from lightllmd.config.document import Document, Unreadable, parse_text
from lightllmd.config.files import read_bytes, refusal
from lightllmd.config.setting import Setting, by_key
from lightllmd.errors import Problem, show

MAX_FILE_BYTES = 1 << 20
MOST_KEYS = 4096  # of one table
TABLE = "keys"
NAME = r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}"
NAME_FORM = "a letter or digit, then up to 63 letters, digits and _ . @ -"
_EXPIRES = "expires"


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One key. What has a `Setting` may stand in its table as it is; limits hold over all api workers together."""

    sha256: Annotated[
        str,
        Setting(
            doc="Of the key, in hexadecimal.",
            pattern="[0-9a-fA-F]{64}",
            form="the SHA-256 of a key: 64 hexadecimal digits",
        ),
    ] = ""
    admin: Annotated[bool, Setting(doc="Whether it opens /metrics and /docs, too.")] = False
    requests_per_minute: Annotated[
        int, Setting(doc="Requests (POST). 0: no limit.", unit="requests", minimum=0, maximum=10**9)
    ] = 0
    tokens_per_minute: Annotated[
        int, Setting(doc="Tokens of prompts and answers. 0: no limit.", unit="tokens", minimum=0, maximum=10**12)
    ] = 0
    max_concurrent: Annotated[
        int, Setting(doc="Requests at a time. 0: no limit.", unit="requests", minimum=0, maximum=10**6)
    ] = 0
    weight: Annotated[
        float,
        Setting(doc="Its share of the engine while others wait, too, in units of the others'.", above=0, maximum=1000),
    ] = 1.0
    priority: Annotated[
        int,
        Setting(
            doc="The most urgent that its requests may ask for; less is sooner. Above 0 they have it without asking.",
            minimum=-100,
            maximum=100,
        ),
    ] = -100
    name: str = ""  # of a named key; empty: it stands in a list
    expires: float | None = None  # Unix seconds; None: never

    @property
    def limited(self) -> bool:
        """Whether any of the limits is set."""
        return bool(self.requests_per_minute or self.tokens_per_minute or self.max_concurrent)

    @property
    def identity(self) -> str:
        """The same for the same holder, whose key may be replaced by another of the same name."""
        return self.name or self.sha256


class KeyRing(msgspec.Struct, frozen=True):
    """The keys in force."""

    requests: list[ApiKey] | None = None  # None: no key is asked for
    metrics: list[ApiKey] | None = None  # of /metrics; None: as `requests`
    open_metrics: bool = False  # /metrics needs no key


class KeysInvalid(Exception):
    """A key file can't be used. `problems` says where in it, if it could be read; `message` is about the file."""

    def __init__(self, message: str, problems: list[Problem] | None = None) -> None:
        super().__init__(message)
        self.message, self.problems = message, problems or []


def hashed(key: str) -> str:
    """What a table keeps of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def ring(requests: list[ApiKey] | None, metrics: list[ApiKey] | None, metrics_setting: str) -> KeyRing:
    """Of what the files hold. `metrics_setting`: `[http] metrics_key`."""
    return KeyRing(requests, metrics, metrics_setting == "none")


def encode(ring: KeyRing) -> bytes:
    """In MessagePack, as api workers get it."""
    return msgspec.msgpack.encode(ring)


def decode(body: bytes) -> KeyRing:
    """What `encode` made."""
    return msgspec.msgpack.decode(body, type=KeyRing)


def read(path: str) -> list[ApiKey]:
    """The keys of a file. Raises KeysInvalid."""
    try:
        body = read_bytes(path, MAX_FILE_BYTES)
    except OSError as failure:
        raise KeysInvalid(f"{show(path)} {refusal(failure)}") from None
    if os.stat(path).st_mode & stat.S_IWOTH and not stat.S_ISCHR(os.stat(path).st_mode):
        raise KeysInvalid(f"every user of this host may write keys into {show(path)}: chmod o-rwx {path}")
    if is_table(body):
        return table(path, body)
    try:
        text = body.decode("utf-8-sig")  # an editor's byte order mark is no part of a key
    except UnicodeDecodeError as failure:
        raise KeysInvalid(f"{show(path)} can't be read: byte {failure.start} is not valid UTF-8") from None
    keys = list(dict.fromkeys(key for line in _lines(text) if (key := line) and not key.startswith("#")))
    if not keys:
        raise KeysInvalid(f"{show(path)} has no key, so that no client could enter")
    return [ApiKey(sha256=hashed(key), admin=True) for key in keys]


def read_ring(files: dict[str, str], metrics_setting: str) -> KeyRing:
    """What the files of `HttpSettings.key_files` hold. Raises KeysInvalid, whose message names each fault."""
    found = {}
    for setting, path in files.items():
        try:
            found[setting] = read(path)
        except KeysInvalid as fault:
            said = "; ".join(str(problem) for problem in fault.problems) or fault.message
            raise KeysInvalid(f"{setting}: {said}") from None
    return ring(found.get("http.api_keys_file"), found.get("http.metrics_key"), metrics_setting)


def is_table(body: bytes) -> bool:
    """Whether a file is a table of named keys: its first line that says anything begins with a bracket."""
    text = body.decode("utf-8-sig", errors="replace")
    return next((line for line in _lines(text) if line and not line.startswith("#")), "").startswith("[")


def _lines(text: str) -> Iterator[str]:
    return (line.strip() for line in text.splitlines())


def table(path: str, body: bytes) -> list[ApiKey]:
    """The keys of a table, in its order; there may be none, so that no client may enter. Raises KeysInvalid."""
    try:
        document = parse_text(path, body)
    except Unreadable as failure:
        raise KeysInvalid(
            f"{show(path)}: {failure.message}", [Problem("", failure.message, path, failure.line)]
        ) from None
    problems: list[Problem] = []
    for name in document.tree:
        if name != TABLE:
            problems.append(document.problem((name,), f"unknown table; a file of keys has [{TABLE}.NAME] alone"))
    entries = document.tree.get(TABLE, {})
    found: list[ApiKey] = []
    if not isinstance(entries, dict):
        problems.append(document.problem((TABLE,), f"{check.said(entries)}, expected a table"))
    elif len(entries) > MOST_KEYS:
        problems.append(document.problem((TABLE,), f"{len(entries)} keys are more than {MOST_KEYS}"))
    else:
        found = [key for name in entries if (key := _entry(document, name, problems)) is not None]
    by_hash: dict[str, str] = {}
    for key in found:
        if (other := by_hash.setdefault(key.sha256, key.name)) != key.name:
            problems.append(document.problem((TABLE, key.name, "sha256"), f"is the key of {show(other)} already"))
    if problems:
        raise KeysInvalid(f"{show(path)} is not valid", problems)
    return found


def _entry(document: Document, name: str, problems: list[Problem]) -> ApiKey | None:
    """None where something is wrong with it, which goes to `problems`."""
    before, values = len(problems), document.tree[TABLE][name]
    here = (TABLE, name)
    if not re.fullmatch(NAME, name):
        problems.append(document.problem(here, f"{show(name)} is no name of a key: {NAME_FORM}"))
    if not isinstance(values, dict):
        problems.append(document.problem(here, f"{check.said(values)}, expected a table"))
        return None
    known = by_key(ApiKey)
    taken: dict[str, Any] = {"name": name}
    for field, value in values.items():
        at = (*here, field)
        if field == _EXPIRES:
            taken[field] = _moment(document, at, value, problems)
        elif field not in known:
            close = check.nearest(field, [*known, _EXPIRES])
            problems.append(document.problem(at, f"unknown key; nearest: {close}" if close else "unknown key"))
        else:
            taken[field], faults = check.check(known[field], value)
            problems += [document.problem(at, fault.message) for fault in faults]
    if "sha256" not in values:
        problems.append(document.problem(here, "sha256 is missing: the hash of which key?"))
    if len(problems) > before:
        return None
    taken["sha256"] = taken["sha256"].lower()
    return ApiKey(**taken)


def _moment(document: Document, at: tuple[str, ...], value: Any, problems: list[Problem]) -> float | None:
    """Unix seconds."""
    if isinstance(value, datetime.datetime) and value.tzinfo is not None:
        return value.timestamp()
    said = show(value.isoformat() if isinstance(value, (datetime.date, datetime.time)) else value)
    problems.append(
        document.problem(at, f"{said} is no moment with its time zone, such as 2027-01-01T00:00:00Z, without quotes")
    )
    return None


def exposed(path: str) -> str:
    """What is unwise about who may read or change the file; empty: nothing is."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    if found.st_mode & stat.S_IROTH:
        return f"every user of this host may read the keys in {path}: chmod o-rwx {path}"
    if found.st_uid not in (0, os.geteuid()):
        return f"another user, uid {found.st_uid}, owns {path} and may let any client in: chown it to root"
    return ""
