"""The certificate and key that HTTPS is served with: read, checked as a pair, and made a context of.

The supervisor reads the files and keeps what it read, so that an api worker that starts while the files are broken gets
the pair that is in force. Workers get it by a message of its own: it is in no plan, no report and no other process.
"""

from __future__ import annotations

import os
import ssl
import stat
import time
from collections.abc import Iterator

import msgspec

from lightllmd.config.files import read_bytes, refusal
from lightllmd.errors import show

MAX_FILE_BYTES = 1 << 20
_SOON = 14 * 86400.0  # seconds before its end from which a certificate is warned of
_SEQUENCE, _CONTEXT_0, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18  # tags of DER


class TlsPair(msgspec.Struct, frozen=True):
    """What the files hold, in PEM."""

    certificate: bytes  # the chain, the server's own first
    key: bytes
    client_ca: bytes = b""  # of mutual TLS: clients need a certificate of one of these; empty: they need none
    expires: float = 0.0  # Unix seconds: the end of the first certificate of the chain to end

    def __repr__(self) -> str:
        return f"TlsPair(until {self.until})"

    @property
    def until(self) -> str:
        """`expires` in words."""
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.expires))


class TlsInvalid(Exception):
    """The files can't be used. `setting`: whose file it is; `message` names the file and says why."""

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(message)
        self.setting, self.message = setting, message


def read_named(files: tuple[str, str, str]) -> TlsPair | None:
    """Of `HttpSettings.tls_files`; None where none are named. Raises TlsInvalid."""
    return read(*files) if files[0] else None


def read(certificate: str, key: str, client_ca: str = "") -> TlsPair:
    """Of these paths. Raises TlsInvalid."""
    bodies = {
        setting: _read(setting, path) if path else b""
        for setting, path in (
            ("http.tls_certificate", certificate),
            ("http.tls_key", key),
            ("http.tls_client_ca", client_ca),
        )
    }
    chain, private, clients = bodies.values()
    try:
        ends = [end for _, end in _validities(chain)]
    except ValueError as wrong:
        raise TlsInvalid("http.tls_certificate", f"{show(certificate)} {wrong}") from None
    pair = TlsPair(chain, private, clients, min(ends))
    try:
        context(pair)
    except _Unusable as wrong:
        path = {"http.tls_certificate": certificate, "http.tls_key": key, "http.tls_client_ca": client_ca}[
            wrong.setting
        ]
        raise TlsInvalid(wrong.setting, f"{show(path)} {wrong}") from None
    return pair


def unwise(pair: TlsPair, key: str, now: float | None = None) -> Iterator[tuple[str, str]]:
    """(setting, what is wrong) of what is valid all the same. `key`: the path; `now`: Unix seconds."""
    left = pair.expires - (time.time() if now is None else now)
    if left <= 0:
        yield "http.tls_certificate", f"the certificate expired at {pair.until}: clients will refuse it"
    elif left < _SOON:
        yield "http.tls_certificate", f"the certificate expires at {pair.until}, in {left / 86400:.1f} days"
    try:
        mode = os.stat(key).st_mode
    except OSError:
        return
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        yield "http.tls_key", f"every user of this host may read or write {key}: chmod o-rwx {key}"


class _Unusable(Exception):
    def __init__(self, setting: str, message: str) -> None:
        super().__init__(message)
        self.setting = setting


def context(pair: TlsPair) -> ssl.SSLContext:
    """For connections to come, of TLS 1.2 and newer. Raises an exception for a pair that `read` would not return."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_SINGLE_ECDH_USE
    made.set_alpn_protocols(["http/1.1"])
    certificate, key = _in_memory(pair.certificate), _in_memory(pair.key)
    encrypted = False

    def password() -> str:
        nonlocal encrypted
        encrypted = True
        return ""

    try:
        made.load_cert_chain(certificate, key, password)
    except (ssl.SSLError, ValueError) as wrong:
        if encrypted:
            raise _Unusable("http.tls_key", "is encrypted: a key without a passphrase is needed") from None
        if getattr(wrong, "reason", "") in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
            raise _Unusable("http.tls_key", "is not the key of the first certificate in tls_certificate") from None
        if b"PRIVATE KEY" not in pair.key:
            raise _Unusable("http.tls_key", "holds no private key in PEM") from None
        raise _Unusable("http.tls_key", f"can't be used with tls_certificate: {wrong}") from None
    finally:
        for path in (certificate, key):
            os.close(int(path.rpartition("/")[2]))
    if pair.client_ca:
        try:
            made.load_verify_locations(cadata=pair.client_ca.decode("ascii"))
        except (ssl.SSLError, ValueError):
            raise _Unusable("http.tls_client_ca", "holds no certificate in PEM") from None
        made.verify_mode = ssl.CERT_REQUIRED
    return made


def _in_memory(body: bytes) -> str:
    """A path of a file that no other process sees, since OpenSSL reads files; the caller closes the descriptor, which
    is its last part."""
    fd = os.memfd_create("lightllmd-tls", os.MFD_CLOEXEC)
    os.write(fd, body)
    return f"/proc/self/fd/{fd}"


def _read(setting: str, path: str) -> bytes:
    try:
        return read_bytes(path, MAX_FILE_BYTES)
    except OSError as failure:
        raise TlsInvalid(setting, f"{show(path)} {refusal(failure)}") from None


# --- certificates -------------------------------------------------------------------------------------------------


def _validities(chain: bytes) -> list[tuple[float, float]]:
    """(from, until), in Unix seconds, of each certificate (RFC 5280, 4.1). Raises ValueError, which follows the name of
    a file. Python's ssl tells it of a connection's peer alone."""
    begin, end = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
    blocks = [block.partition(end)[0] for block in chain.split(begin)[1:]]
    if not blocks:
        raise ValueError("holds no certificate in PEM")
    try:
        return [
            _validity(ssl.PEM_cert_to_DER_cert(f"{begin.decode()}{block.decode()}{end.decode()}")) for block in blocks
        ]
    except (ValueError, IndexError):
        raise ValueError("holds a certificate that can't be read") from None


def _validity(der: bytes) -> tuple[float, float]:
    """Certificate > tbsCertificate > [version], serialNumber, signature, issuer, validity."""
    tag, certificate, _ = _element(der)
    tag, body, _ = _element(certificate)
    if tag != _SEQUENCE:
        raise ValueError(tag)
    tag, _, rest = _element(body)
    skip = 3 if tag == _CONTEXT_0 else 2
    for _ in range(skip):
        tag, _, rest = _element(rest)
    tag, validity, _ = _element(rest)
    if tag != _SEQUENCE:
        raise ValueError(tag)
    first, begins, rest = _element(validity)
    second, ends, _ = _element(rest)
    return _moment(first, begins), _moment(second, ends)


def _element(der: bytes) -> tuple[int, bytes, bytes]:
    """(tag, content, what follows)."""
    tag, size, at = der[0], der[1], 2
    if size & 0x80:
        at += size & 0x7F
        size = int.from_bytes(der[2:at])
    if at + size > len(der):
        raise ValueError("truncated")
    return tag, der[at : at + size], der[at + size :]


def _moment(tag: int, text: bytes) -> float:
    import calendar

    written = text.decode("ascii")
    if tag == _UTC_TIME:
        written = ("19" if written[:2] >= "50" else "20") + written
    elif tag != _GENERALIZED_TIME:
        raise ValueError(tag)
    return float(calendar.timegm(time.strptime(written, "%Y%m%d%H%M%SZ")))
