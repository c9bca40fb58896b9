"""Bearer keys on everything but the health routes, as plain ASGI middleware."""

from __future__ import annotations

import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from lightllmd.api.errors import error_response
from lightllmd.config.files import read_bytes
from lightllmd.errors import ConfigInvalid, Problem, Unauthorized

MAX_FILE_BYTES = 1 << 20
OPEN_PATHS = frozenset({"/health", "/healthz", "/liveness", "/readiness"})


def read_keys(path: str) -> list[str]:
    """One key a line; blank lines and lines that begin with # are skipped. Raises ConfigInvalid."""
    try:
        lines = [line.strip() for line in read_bytes(path, MAX_FILE_BYTES).decode("utf-8").splitlines()]
    except OSError as failure:
        raise ConfigInvalid([Problem("http.api_keys_file", f"{path} can't be read: {failure.strerror}")]) from failure
    except UnicodeDecodeError as failure:
        raise ConfigInvalid([Problem("http.api_keys_file", f"{path} can't be read: {failure}")]) from failure
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigInvalid([Problem("http.api_keys_file", f"{path} has no key, so that nobody could enter")])
    return keys


class BearerKeys:
    """Compares digests in constant time, against every key, so that timing tells nothing."""

    def __init__(self, app: ASGIApp, keys: list[str]) -> None:
        self.app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._admits(scope):
            await self.app(scope, receive, send)
            return
        error = Unauthorized("a valid API key is required: Authorization: Bearer KEY", code="invalid_api_key")
        await error_response(error, scope["path"])(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)
