"""The certificate in force, and its files.

Its job is done beside all others: a certificate is renewed while a swap goes on. What api workers serve with is in
`Context.tls`, which `Reload` changes when the files have other names.
"""

from __future__ import annotations

from collections.abc import Callable

from lightllmd.config import tls
from lightllmd.config.tls import TlsInvalid, TlsPair
from lightllmd.ipc.messages import Down
from lightllmd.supervisor import snapshot
from lightllmd.supervisor.change.watched_files import Unusable, WatchedFiles
from lightllmd.supervisor.context import Context


class CertificateInForce(WatchedFiles[TlsPair]):
    """Belongs to the single-writer loop. `tell` reaches every api worker."""

    def __init__(self, context: Context, tell: Callable[[Down], None]) -> None:
        super().__init__(context, "tls", "the certificate")
        self._tell = tell

    @property
    def _files(self) -> tuple[str, ...]:
        files = self._context.config.http.tls_files
        return files if files[0] else ()

    def _read(self, files: tuple[str, ...]) -> TlsPair:
        try:
            return tls.read(*files)
        except TlsInvalid as fault:
            raise Unusable(f"{fault.setting}: {fault.message}") from None

    def _take(self, content: TlsPair) -> None:
        self.put_in_force(content)

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
        self._tell_pair()

    def _tell_fault(self) -> None:
        self._tell_pair()

    def _tell_pair(self) -> None:
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
