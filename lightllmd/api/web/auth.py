"""Bearer keys on everything but the health routes, as plain ASGI middleware."""

from __future__ import annotations

import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from lightllmd.api.web.errors import ErrorAnswers
from lightllmd.api.web.tenants import KEY
from lightllmd.config.keys import KeyDigests
from lightllmd.errors import Unauthorized

METRICS_PATH = "/metrics"
OPEN_PATHS = frozenset({"/health", "/healthz", "/liveness", "/readiness"})


class AcceptedKeys:
    """Digests of the keys in force. Where there are none, none is asked for."""

    def __init__(self, keys: KeyDigests) -> None:
        self.accept(keys.requests, keys.metrics)

    def accept(self, requests: list[str], metrics: list[str] | None) -> None:
        """From now on these and no others; as `config.keys.KeyDigests`."""
        self._requests = [bytes.fromhex(digest) for digest in requests]
        self._metrics = self._requests if metrics is None else [bytes.fromhex(digest) for digest in metrics]

    def of(self, path: str) -> list[bytes]:
        """Those of which one lets a request for `path` pass."""
        return self._metrics if path == METRICS_PATH else self._requests


class BearerKeys:
    """Compares digests in constant time, against every key, so that timing tells nothing."""

    def __init__(self, app: ASGIApp, keys: AcceptedKeys, errors: ErrorAnswers) -> None:
        self.app = app
        self._errors = errors
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._admits(scope):
            await self.app(scope, receive, send)
            return
        error = Unauthorized("a valid API key is required: Authorization: Bearer KEY", code="invalid_api_key")
        await self._errors.response(error, scope["path"])(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        digests = self._keys.of(scope["path"])
        if not digests:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in digests]
        scope[KEY] = digest
        return any(matches)
