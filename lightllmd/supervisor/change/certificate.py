"""The certificate in force, and its files: looked at about once a second, taken up at once where they can be used.

Its job is done beside all others: a certificate is renewed while a swap goes on. What api workers serve with is in
`Context.tls`, which `Reload` changes when the files have other names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from lightllmd.config import tls
from lightllmd.config.tls import TlsInvalid, TlsPair
from lightllmd.errors import LightllmdError
from lightllmd.ipc.messages import Down
from lightllmd.supervisor import snapshot
from lightllmd.supervisor.background import BackgroundTask
from lightllmd.supervisor.context import Context

# Looks at which files have to be broken until that is told: certificate and key are not replaced at the same moment.
_LOOKS = 2


@dataclass(frozen=True)
class _Found:
    """By one look at the files of these names."""

    files: tuple[str, str, str]
    stats: object
    pair: TlsPair | None  # None: they can't be used, and `fault` says why
    fault: str = ""


class CertificateInForce:
    """Belongs to the single-writer loop. `tell` reaches every api worker."""

    def __init__(self, context: Context, tell: Callable[[Down], None]) -> None:
        self._context = context
        self._tell = tell
        self._look: BackgroundTask[_Found | None] | None = None
        self._seen: object = None  # names and stats of the files that are in force
        self._broken = 0  # looks that found them so
        self.fault = ""  # why the files can't be used; what they held before is in force

    def look(self) -> None:
        """Begins a look, in a thread; one that hangs holds up this alone."""
        files = self._context.config.http.tls_files
        if self._look is None and files[0]:
            self._look = BackgroundTask(self._context, self._looked(files, self._seen))

    async def _looked(self, files: tuple[str, str, str], seen: object) -> _Found | None:
        what = "looking at the certificate"
        try:
            return await self._context.file_threads.run(what, _read, files, seen)
        except LightllmdError as failure:
            return _Found(files, None, None, failure.message)

    def step(self) -> None:
        """Takes up what a look has found."""
        if self._look is None or not self._look.done:
            return
        look, self._look = self._look, None
        found = look.result()
        if found is None or found.files != self._context.config.http.tls_files:
            return
        if found.pair is None:
            self._broken += 1
            if self._broken >= _LOOKS and found.fault != self.fault:
                self.fault = found.fault
                self._context.events.add("tls", f"the certificate stays as it was: {self.fault}", level="warning")
                self._send()
            return
        self._broken, self._seen = 0, (found.files, found.stats)
        self.put_in_force(found.pair)

    def put_in_force(self, pair: TlsPair | None) -> None:
        """For new connections. Nothing happens where it is in force already and its files are sound."""
        before = self._context.tls
        same = before == pair
        if same and not self.fault:
            return
        self._context.tls, self.fault, self._broken = pair, "", 0
        if pair is not None:
            said = "is sound again" if same else f"changed: {pair.until} is the end of the one in force"
            self._context.events.add("tls", f"the certificate {said}")
        self._send()

    def _send(self) -> None:
        told = self._context.tls_message(bool(self.fault))
        if told is not None:
            self._tell(told)

    def snapshot(self) -> snapshot.Certificate | None:
        """None where HTTP is served."""
        pair = self._context.tls
        if pair is None:
            return None
        return snapshot.Certificate(
            file=self._context.config.http.tls_certificate,
            expires=pair.expires,
            mutual=bool(pair.client_ca),
            fault=self.fault,
        )


def _read(files: tuple[str, str, str], seen: object) -> _Found | None:
    """In a thread. None: they are as `seen`. Costs a stat for each file unless one of them was touched."""
    stats = [_stat(file) for file in files]
    if (files, stats) == seen:
        return None
    try:
        return _Found(files, stats, tls.read_named(files))
    except TlsInvalid as fault:
        return _Found(files, stats, None, f"{fault.setting}: {fault.message}")


def _stat(file: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
