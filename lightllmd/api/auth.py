"""Bearer keys on everything but the health routes, as plain ASGI middleware."""

from __future__ import annotations

import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from lightllmd.api.errors import error_response
from lightllmd.config.files import read_bytes
from lightllmd.config.parameters import HttpSettings
from lightllmd.errors import ConfigInvalid, Problem, Unauthorized

MAX_FILE_BYTES = 1 << 20
METRICS_PATH = "/metrics"
OPEN_PATHS = frozenset({"/health", "/healthz", "/liveness", "/readiness"})


def read_keys(path: str, setting: str = "http.api_keys_file") -> list[str]:
    """One key a line; blank lines and lines that begin with # are skipped. Raises ConfigInvalid."""
    try:
        lines = [line.strip() for line in read_bytes(path, MAX_FILE_BYTES).decode("utf-8").splitlines()]
    except OSError as failure:
        raise ConfigInvalid([Problem(setting, f"{path} can't be read: {failure.strerror}")]) from failure
    except UnicodeDecodeError as failure:
        raise ConfigInvalid([Problem(setting, f"{path} can't be read: {failure}")]) from failure
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigInvalid([Problem(setting, f"{path} has no key, so that no client could enter")])
    return keys


def keys_of(http: HttpSettings) -> tuple[list[str], list[str] | None]:
    """Those of requests, those of /metrics, as `BearerKeys` takes them. Raises ConfigInvalid."""
    read = {setting: read_keys(path, setting) for setting, path in http.key_files.items()}
    metrics = read.get("http.metrics_key", []) if http.metrics_key else None
    return read.get("http.api_keys_file", []), metrics


class BearerKeys:
    """Compares digests in constant time, against every key, so that timing tells nothing."""

    def __init__(self, app: ASGIApp, keys: list[str], metrics_keys: list[str] | None) -> None:
        """Where there are no keys, none is asked for. `metrics_keys`: None for the same as the rest."""
        self.app = app
        self._digests = _digests(keys)
        self._metrics_digests = self._digests if metrics_keys is None else _digests(metrics_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._admits(scope):
            await self.app(scope, receive, send)
            return
        error = Unauthorized("a valid API key is required: Authorization: Bearer KEY", code="invalid_api_key")
        await error_response(error, scope["path"])(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        digests = self._metrics_digests if scope["path"] == METRICS_PATH else self._digests
        if not digests:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in digests]
        return any(matches)


def _digests(keys: list[str]) -> list[bytes]:
    return [hashlib.sha256(key.encode()).digest() for key in keys]
