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
        error = Unauthorized(
            "a valid API key is required: Authorization: Bearer KEY or x-api-key: KEY", code="invalid_api_key"
        )
        await self._errors.response(error, scope)(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        digests = self._keys.of(scope["path"])
        if not digests:
            return True
        digest = hashlib.sha256(_given_key(scope)).digest()
        matches = [hmac.compare_digest(digest, known) for known in digests]
        scope[KEY] = digest
        return any(matches)


def _given_key(scope: Scope) -> bytes:
    """That of `Authorization: Bearer KEY` or, as Anthropic's clients send it, of `x-api-key: KEY`; empty: there is
    none, which no digest is of."""
    headers = dict(reversed(scope["headers"]))  # the first of a name counts
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return (key if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")).strip()
