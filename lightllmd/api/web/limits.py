"""Limits of API keys: requests and tokens per minute, and requests at a time, over all api workers together.

A request counts when its header is complete, a prompt's tokens when they are known, before the engine gets any, and an
answer's as they are generated. Running answers go on when the tokens of a minute are used up: what is overdrawn has to
come in before the next request passes. What an engine that was killed has generated is in the ledger and counted once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from datetime import UTC, datetime

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightllmd.api.inflight.entry import Entry
from lightllmd.api.web.errors import ErrorAnswers
from lightllmd.api.web.refusals import Refusals
from lightllmd.api.web.tenants import KEY
from lightllmd.config.keys import ApiKey
from lightllmd.errors import DeadlineExceeded, QueueFull, RateLimited
from lightllmd.ipc.quota import Bucket, Quota

LEASE = "lightllmd.lease"  # in a scope: the `Lease` of a request whose key has limits
_OUR_FAULT = 500  # from this status on
_CONCURRENT_RETRY = 1.0  # seconds
_ANTHROPIC = "/v1/messages"  # paths of clients that read other headers
_BUCKETS: tuple[Bucket, ...] = ("requests", "tokens")
_TOLD = ("limit", "remaining", "reset")
HEADERS = [f"x-ratelimit-{name}-{bucket}" for bucket in _BUCKETS for name in _TOLD]


class Lease:
    """What one request has taken of its key's limits."""

    def __init__(self, key: ApiKey, quota: Quota) -> None:
        self.key = key
        self._quota = quota
        self._name = key.identity
        self._tokens = 0  # taken
        self._entries: Iterable[Entry] = ()
        self._counted = 0  # of what they generated
        self.refusal: RateLimited | None = None  # of the prompt's tokens

    def enter(self) -> None:
        """Raises RateLimited, with nothing taken."""
        key, quota, name = self.key, self._quota, self._name
        if not quota.enter(name, key.max_concurrent):
            raise _refusal(key, "max_concurrent", f"{key.max_concurrent} requests at a time", _CONCURRENT_RETRY)
        try:
            if tokens := key.tokens_per_minute:  # what is overdrawn comes in first
                self._require(quota.take(name, "tokens", 0, tokens), "tokens_per_minute", f"{tokens} tokens per minute")
            if requests := key.requests_per_minute:
                wait = quota.take(name, "requests", 1, requests)
                self._require(wait, "requests_per_minute", f"{requests} requests per minute")
        except RateLimited:
            quota.leave(name)
            raise

    def take_prompt(self, tokens: int) -> None:
        """Raises RateLimited, with no token taken."""
        if limit := self.key.tokens_per_minute:
            wait = self._quota.take(self._name, "tokens", tokens, limit)
            what = f"{limit} tokens per minute, and the prompt has {tokens}"
            try:
                self._require(wait, "tokens_per_minute", what)
            except RateLimited as refusal:
                self.refusal = refusal
                raise
            self._tokens += tokens

    def _require(self, wait: float | None, field: str, what: str) -> None:
        if wait is not None:
            raise _refusal(self.key, field, what, wait)

    def follow(self, entries: Iterable[Entry]) -> None:
        """What is generated for these counts from now on."""
        self._entries = entries

    def count(self) -> None:
        """Charges what was generated since the last call."""
        if not self.key.tokens_per_minute:
            return
        generated = sum(entry.generated for entry in self._entries)
        if generated > self._counted:
            self._quota.charge(self._name, "tokens", generated - self._counted, self.key.tokens_per_minute)
            self._tokens += generated - self._counted
            self._counted = generated

    def end(self, status: int) -> None:
        """The answer has ended. `status`: its own, 0 where it has none: the client left. What failed by a fault of ours
        has cost nothing."""
        self.count()
        ours = self._ours(status)
        if ours and self.key.requests_per_minute:
            self._quota.charge(self._name, "requests", -1, self.key.requests_per_minute)
        if ours and self._tokens:
            self._quota.charge(self._name, "tokens", -self._tokens, self.key.tokens_per_minute)
        self._quota.leave(self._name)

    def _ours(self, status: int) -> bool:
        failed = [entry for entry in self._entries if entry.error is not None]
        if failed:
            return any(map(_failed_by_us, failed))
        queue_full = status == QueueFull.status and self.refusal is None
        return queue_full or status >= _OUR_FAULT

    def headers(self, path: str) -> list[tuple[bytes, bytes]]:
        """What clients read of what is left: OpenAI's, or Anthropic's on its routes."""
        limits = (self.key.requests_per_minute, self.key.tokens_per_minute)
        told: list[tuple[bytes, bytes]] = []
        for bucket, limit in zip(_BUCKETS, limits, strict=True):
            if not limit:
                continue
            left, full = self._quota.left(self._name, bucket, limit)
            reset, named = _duration(full), "x-ratelimit-{1}-{0}"
            if path.startswith(_ANTHROPIC):
                reset = datetime.fromtimestamp(math.ceil(time.time() + full), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                named = "anthropic-ratelimit-{0}-{1}"
            values = (str(limit), str(left), reset)
            told += [
                (named.format(bucket, name).encode(), value.encode()) for name, value in zip(_TOLD, values, strict=True)
            ]
        return told


class KeyLimits:
    """Middleware, inside of that which finds the keys. What goes to the engine has its tokens counted by `Responder`,
    which finds the lease in the scope."""

    def __init__(self, app: ASGIApp, leases: Leases, errors: ErrorAnswers, refusals: Refusals) -> None:
        self.app = app
        self._leases = leases
        self._errors = errors
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key: ApiKey | None = scope.get(KEY)
        if key is None or not key.limited or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        lease, path = Lease(key, self._leases.quota), scope["path"]

        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                lease.count()
                message = {**message, "headers": [*message["headers"], *lease.headers(path)]}
            await send(message)

        try:
            lease.enter()
        except RateLimited as refusal:
            self._refusals.note(scope, refusal)
            response = self._errors.response(refusal, scope)
            response.raw_headers += lease.headers(path)
            await response(scope, receive, send)
            return
        scope[LEASE] = lease
        self._leases.open.add(lease)
        try:
            await self.app(scope, receive, send_with_headers)
        except Exception:
            status = _OUR_FAULT
            raise
        finally:
            self._leases.open.discard(lease)
            lease.end(status)
            if lease.refusal is not None:
                self._refusals.note(scope, lease.refusal)


class Leases:
    """Of one api worker: those of requests that are being answered."""

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.open: set[Lease] = set()

    def tick(self) -> None:
        """Counts what was generated meanwhile. Call it several times a second."""
        for lease in self.open:
            lease.count()


def take_prompts(scope: Scope, tokens: int) -> None:
    """The prompts of a request have so many tokens; raises RateLimited where its key may not have them now."""
    lease: Lease | None = scope.get(LEASE)
    if lease is not None:
        lease.take_prompt(tokens)


def follow(scope: Scope, entries: Iterable[Entry]) -> None:
    """What is generated for these counts for the key of the request."""
    lease: Lease | None = scope.get(LEASE)
    if lease is not None:
        lease.follow(entries)


def _failed_by_us(entry: Entry) -> bool:
    error = entry.error
    if isinstance(error, DeadlineExceeded) and entry.deadline is not None and entry.ended_at is not None:
        return entry.ended_at < entry.deadline  # else the client's own time was over
    return isinstance(error, QueueFull) or (error is not None and type(error).status >= _OUR_FAULT)


def _refusal(key: ApiKey, field: str, what: str, wait: float) -> RateLimited:
    """`wait`: seconds; inf: for ever."""
    called = f"the API key {key.name}" if key.name else "this API key"
    retry_after = None if wait == float("inf") else wait
    never = ", so that it will never pass" if retry_after is None else ""
    message = f"{called} has a limit of {what}{never} ({field})"
    why = f"{key.name or 'of a list'} has used up its {field}"
    return RateLimited(message, retry_after=retry_after, limit=field, code="rate_limit_exceeded", why=why)


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 6m0s, 1.5s, 20ms."""
    if seconds >= 60:
        return f"{int(seconds // 60)}m{math.ceil(seconds % 60)}s"
    return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s" if seconds >= 1 else f"{math.ceil(seconds * 1000)}ms"
