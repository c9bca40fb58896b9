"""Certificates for tests, made by the openssl command."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_EC = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]


@dataclass(frozen=True)
class Made:
    certificate: Path
    key: Path

    @property
    def settings(self) -> dict[str, str]:
        return {"tls_certificate": str(self.certificate), "tls_key": str(self.key)}

    def client(self, trusted: Path | None = None) -> ssl.SSLContext:
        """Of a client that trusts this certificate (or another) for localhost and 127.0.0.1."""
        return ssl.create_default_context(cafile=str(trusted or self.certificate))

    def put(self, other: Made) -> None:
        """The other's files in place of these, each at once, as certbot does it."""
        for mine, theirs in ((self.certificate, other.certificate), (self.key, other.key)):
            new = mine.with_suffix(".new")
            shutil.copy(theirs, new)
            new.chmod(0o600)
            new.rename(mine)


def make(folder: Path, name: str = "server", *, days: int = 100, rsa: bool = False, signer: Made | None = None) -> Made:
    """Signed by itself, or by `signer`. Skips the test where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    made = Made(folder / f"{name}.crt", folder / f"{name}.key")
    kind = ["-newkey", "rsa:2048"] if rsa else _EC
    command = ["openssl", "req", "-x509", *kind, "-nodes", "-days", str(days), "-subj", f"/CN={name}"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    if signer is not None:
        command += ["-CA", str(signer.certificate), "-CAkey", str(signer.key)]
        command += ["-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run([*command, "-keyout", made.key, "-out", made.certificate], check=True, capture_output=True)
    made.key.chmod(0o600)
    return made
