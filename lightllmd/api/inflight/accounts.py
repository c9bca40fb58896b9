"""What happened to requests, told to the metrics: each entered one ends as a success, a failure, or was cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from lightllmd.api.inflight.entry import Entry
from lightllmd.errors import ClientClosed
from lightllmd.observe.metrics import ApiMetrics


class Accounts:
    """Of one api worker, whatever the revision."""

    def __init__(self, metrics: ApiMetrics) -> None:
        self._metrics = metrics

    @contextmanager
    def admission(self) -> Iterator[None]:
        """Around parsing, checking and handing over; a refusal there is a request that entered and failed."""
        try:
            yield
        except (ClientClosed, asyncio.CancelledError):
            self._metrics.entered()
            self._metrics.cancelled()
            raise
        except Exception:
            self._metrics.entered()
            self._metrics.failed()
            raise

    def refused(self, reason: str) -> None:
        """A request was refused because of its API key, or for want of one, before it entered."""
        self._metrics.refused(reason)

    def certificate(self, expires: float, broken: bool) -> None:
        """What HTTPS is served with; see `messages.Tls`."""
        self._metrics.certificate(expires, broken)

    def submitted(self, entry: Entry) -> None:
        """In the ledger now."""
        self._metrics.entered()
        validation = entry.started_at - entry.arrived_at
        self._metrics.submitted(validation, entry.prompt_tokens, entry.params.max_new_tokens)

    def ended(self, entry: Entry) -> None:
        """The entry has an outcome."""
        if entry.first_token_at is not None:
            self._metrics.first_token(entry.first_token_at - entry.arrived_at)
        if entry.outcome == "cancelled":
            self._metrics.cancelled()
        elif entry.outcome == "failed":
            self._metrics.failed()
        elif entry.outcome == "ok":
            assert entry.ended_at is not None
            self._metrics.succeeded(
                entry.ended_at - entry.arrived_at,
                entry.ended_at - entry.started_at,
                [len(branch.ids) for branch in entry.branches],
            )
            self._metrics.cached(entry.cached, entry.prompt_tokens)
