"""Who may ask what: API keys on all but the health routes and the page, and keys of operators on what is theirs."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from lightllmd.api.web.errors import ErrorAnswers
from lightllmd.api.web.refusals import Refusals
from lightllmd.api.web.tenants import KEY
from lightllmd.config.keys import ApiKey, KeyRing
from lightllmd.errors import Forbidden, RequestError, Unauthorized

METRICS_PATH = "/metrics"
OPEN_PATHS = frozenset({"/health", "/healthz", "/liveness", "/readiness"})
OPERATORS_PATHS = ("/metrics", "/docs", "/openapi.json")  # and what is below them
_KEY_HEADERS = (b"x-api-key", b"api-key")  # Anthropic's, Azure's
_ASKED = "Authorization: Bearer KEY (x-api-key and api-key do, too)"


def is_operators(path: str) -> bool:
    """Whether the route is for operators: with named keys it takes one of them with admin = true."""
    return any(path == one or path.startswith(f"{one}/") for one in OPERATORS_PATHS)


class _Keys:
    """Those of one file.

    Found by a digest that is keyed with a secret of this process, so that neither a client nor the time that looking
    takes tells anything of the hash of a key; compared in constant time then.
    """

    def __init__(self, keys: list[ApiKey]) -> None:
        self._secret = secrets.token_bytes(32)
        self._known = {self._place(digest): (digest, key) for key in keys for digest in [bytes.fromhex(key.sha256)]}

    def _place(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._secret, digest_size=16).digest()

    def find(self, digest: bytes) -> ApiKey | None:
        known, key = self._known.get(self._place(digest), (bytes(32), None))
        return key if hmac.compare_digest(digest, known) else None


class AcceptedKeys:
    """The keys in force. Where there are none, none is asked for."""

    def __init__(self, ring: KeyRing, clock: Callable[[], float] = time.time) -> None:
        """`clock`: Unix seconds."""
        self._clock = clock
        self.accept(ring)

    def accept(self, ring: KeyRing) -> None:
        """From now on these and no others."""
        self._requests = None if ring.requests is None else _Keys(ring.requests)
        self._metrics = None if ring.metrics is None else _Keys(ring.metrics)
        self._open_metrics = ring.open_metrics

    @property
    def required(self) -> bool:
        """A request needs one."""
        return self._requests is not None

    def admit(self, scope: Scope) -> ApiKey | None:
        """The key that a request may pass with; None: it needs none. Raises Unauthorized, Forbidden."""
        path = scope["path"]
        own = path == METRICS_PATH and self._metrics is not None
        keys = self._metrics if own else self._requests
        if keys is None or (path == METRICS_PATH and self._open_metrics):
            return None
        digests = [hashlib.sha256(one).digest() for one in _given(scope)]
        key = _first(keys, digests)
        if key is None and own and self._requests is not None and (other := _first(self._requests, digests)):
            raise _forbidden(other, path, "that takes a key of [http] metrics_key")
        if key is None:
            why = "unknown" if digests else "missing"
            raise Unauthorized(f"a valid API key is required: {_ASKED}", code="invalid_api_key", why=why)
        if key.expires is not None and self._clock() >= key.expires:
            when = datetime.fromtimestamp(key.expires, UTC).isoformat(timespec="seconds")
            raise Unauthorized(
                f"{_called(key)} expired at {when}", code="invalid_api_key", why=f"expired, that of {key.name}"
            )
        if is_operators(path) and not own and not key.admin:
            raise _forbidden(key, path, "that takes a key with admin = true")
        return key


class KeyedAccess:
    """Middleware: refuses requests without a key that opens their path."""

    def __init__(
        self,
        app: ASGIApp,
        keys: AcceptedKeys,
        errors: ErrorAnswers,
        refusals: Refusals,
        is_open: Callable[[Scope], bool] = lambda scope: False,
    ) -> None:
        """`is_open`: whether a request needs no key, beside those for `OPEN_PATHS`."""
        self.app = app
        self._is_open = is_open
        self._errors = errors
        self._keys = keys
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._is_open(scope):
            try:
                key = self._keys.admit(scope)
            except RequestError as refusal:
                self._refusals.note(scope, refusal)
                response = self._errors.response(refusal, scope)
                if isinstance(refusal, Unauthorized) and is_operators(scope["path"]):
                    response.headers["WWW-Authenticate"] = (
                        'Basic realm="lightllmd", Bearer'  # a browser asks for it then
                    )
                await response(scope, receive, send)
                return
            if key is not None:
                scope[KEY] = key
        await self.app(scope, receive, send)


def _given(scope: Scope) -> Iterator[bytes]:
    """Every key that the headers bring."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    for name, value in headers:
        if name == b"authorization":
            scheme, _, value = value.partition(b" ")
            if scheme.lower() == b"basic" and is_operators(scope["path"]):
                value = _password(value)
            elif scheme.lower() != b"bearer":
                continue
        elif name not in _KEY_HEADERS:
            continue
        if value := value.strip():
            yield value


def _password(value: bytes) -> bytes:
    """Of HTTP's basic authentication (RFC 7617), which browsers can do; on other routes a page of another origin could
    have a browser use it. Empty where there is none."""
    try:
        return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    except ValueError:
        return b""


def _first(keys: _Keys, digests: list[bytes]) -> ApiKey | None:
    """Looks at all of them, whichever it is."""
    found: list[Any] = [keys.find(digest) for digest in digests]
    return next((key for key in found if key is not None), None)


def _forbidden(key: ApiKey, path: str, takes: str) -> Forbidden:
    why = f"{key.name or 'of a list'} is not one for operators"
    return Forbidden(f"{_called(key)} does not open {path}: {takes}", code="permission_denied", why=why)


def _called(key: ApiKey) -> str:
    return f"the API key {key.name}" if key.name else "this API key"
