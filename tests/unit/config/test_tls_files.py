"""The files of TLS: what can't be used is refused by its setting and file, what is unwise is warned of."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lightllmd.config import tls
from lightllmd.config.load import load
from lightllmd.errors import ConfigInvalid, show
from tls_files import Made, make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def server(folder: Path) -> Made:
    return make(folder)


@pytest.fixture(scope="module")
def other(folder: Path) -> Made:
    return make(folder, "other", days=10)


@pytest.fixture(scope="module")
def rsa(folder: Path) -> Made:
    return make(folder, "rsa", rsa=True)


def loaded(made: Made, **settings: str):
    flags = {f"http.{name}": value for name, value in {**made.settings, **settings}.items()}
    return load(None, {"engine.backend": "fake", **flags})


def test_a_pair_is_taken_and_its_end_is_that_of_the_certificate(server: Made, rsa: Made) -> None:
    for made in (server, rsa):
        pair = tls.read(str(made.certificate), str(made.key))
        command = ["openssl", "x509", "-enddate", "-noout", "-in", str(made.certificate)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        end = datetime.strptime(told, "notAfter=%b %d %H:%M:%S %Y GMT\n").replace(tzinfo=UTC)
        assert pair.expires == end.timestamp()
        assert loaded(made).warnings == []


def test_of_a_chain_the_first_to_end_counts(server: Made, other: Made, tmp_path: Path) -> None:
    chain = tmp_path / "chain.crt"
    chain.write_bytes(server.certificate.read_bytes() + other.certificate.read_bytes())
    assert tls.read(str(chain), str(server.key)).expires == tls.read(*map(str, (other.certificate, other.key))).expires


def encrypted(made: Made, path: Path) -> None:
    command = ["openssl", "pkey", "-in", str(made.key), "-aes128", "-passout", "pass:x", "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)


FAULTS: dict[str, tuple[str, Callable[[Path, Made, Made, Made], object], str]] = {
    "no certificate file": ("tls_certificate", lambda path, *_: None, "does not exist"),
    "a folder": ("tls_certificate", lambda path, *_: path.mkdir(), "it is a directory"),
    "no certificate": ("tls_certificate", lambda path, *_: path.write_text("hello"), "holds no certificate in PEM"),
    "the key as certificate": (
        "tls_certificate",
        lambda path, server, *_: shutil.copy(server.key, path),
        "holds no certificate in PEM",
    ),
    "a certificate that is cut": (
        "tls_certificate",
        lambda path, server, *_: path.write_text("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"),
        "can't be read",
    ),
    "no key file": ("tls_key", lambda path, *_: None, "does not exist"),
    "another key": (
        "tls_key",
        lambda path, server, other, rsa: shutil.copy(other.key, path),
        "is not the key of the first certificate",
    ),
    "a key of another kind": (
        "tls_key",
        lambda path, server, other, rsa: shutil.copy(rsa.key, path),
        "is not the key of the first certificate",
    ),
    "no key": ("tls_key", lambda path, *_: path.write_text("hello"), "holds no private key in PEM"),
    "a key with a passphrase": ("tls_key", lambda path, server, *_: encrypted(server, path), "is encrypted"),
    "no authorities": ("tls_client_ca", lambda path, *_: path.write_text("hello"), "holds no certificate in PEM"),
}


@pytest.mark.parametrize(("setting", "write", "part"), FAULTS.values(), ids=FAULTS)
def test_a_file_that_cant_be_used_is_a_fault_of_its_setting(
    tmp_path: Path, server: Made, other: Made, rsa: Made, setting: str, write: Callable[..., object], part: str
) -> None:
    path = tmp_path / "file.pem"
    write(path, server, other, rsa)
    with pytest.raises(ConfigInvalid) as refused:
        loaded(server, **{setting: str(path)})
    (problem,) = refused.value.problems
    assert problem.key == f"http.{setting}"
    assert show(str(path)) in problem.message
    assert part in problem.message


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"tls_key": ""}, "must be set together"),
        ({"tls_certificate": ""}, "must be set together"),
        ({"tls_certificate": "", "tls_key": "", "tls_client_ca": "ca.pem"}, "needs http.tls_certificate"),
    ],
)
def test_settings_that_need_each_other(server: Made, settings: dict[str, str], part: str) -> None:
    with pytest.raises(ConfigInvalid, match=part):
        loaded(server, **settings)


def test_what_is_unwise_is_warned_of(server: Made, other: Made) -> None:
    [warning] = loaded(other).warnings
    assert "http.tls_certificate: the certificate expires at" in warning
    assert "in 10.0 days" in warning
    pair = tls.read(str(server.certificate), str(server.key))
    [(setting, warning)] = tls.unwise(pair, str(server.key), now=pair.expires + 1)
    assert setting == "http.tls_certificate"
    assert "expired at" in warning
    server.key.chmod(0o644)
    assert any("every user of this host may read or write" in warning for warning in loaded(server).warnings)
    server.key.chmod(0o600)


def test_no_plan_holds_the_key(server: Made) -> None:
    config = loaded(server)
    assert "PRIVATE" not in repr(config)
    assert "PRIVATE" not in repr(tls.read(str(server.certificate), str(server.key)))
