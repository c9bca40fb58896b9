"""The restart policy: whether and when a worker that died is started again. Pure, and on one screen."""

from __future__ import annotations

from dataclasses import dataclass

from lightllmd.config.parameters import SupervisorSettings

PROVED_AFTER = 5.0  # seconds in service after which a start counts as good, even without a request


@dataclass(frozen=True)
class Decision:
    """What follows a death."""

    delay: float | None  # seconds until the next start; None: never with this plan
    failures: tuple[float, ...]  # when the failed starts happened that still count
    limited: bool = False  # the start limit is reached: only slow retries go on


def decide(
    failures: tuple[float, ...],
    now: float,
    *,
    proved: bool,
    permanent: bool,
    settings: SupervisorSettings,
    jitter: float,
) -> Decision:
    """What follows a death at `now`.

    `proved`: it had served a token (or a request), or had been in service for `PROVED_AFTER` seconds.
    `permanent`: the same plan would fail again (configuration, weights, memory, device).
    `jitter`: a random number in [0, 1) that spreads the back-off by a quarter to both sides.

    The first restart is immediate. Only starts that failed (died unproved) within `start_limit_interval` count;
    a proved one wipes them out. The n-th waits backoff_initial * 2**(n - 2), at most backoff_max, and beyond
    `start_limit_burst` of them each waits `retry_interval`, for ever.
    """
    if permanent:
        return Decision(None, failures)
    if proved:
        return Decision(0.0, ())
    counted = (*(at for at in failures if now - at < settings.start_limit_interval), now)
    counted = counted[-settings.start_limit_burst - 1 :]
    if len(counted) > settings.start_limit_burst:
        return Decision(settings.retry_interval, counted, limited=True)
    if len(counted) == 1:
        return Decision(0.0, counted)
    delay = min(settings.backoff_initial * 2.0 ** (len(counted) - 2), settings.backoff_max)
    return Decision(delay * (0.75 + 0.5 * jitter), counted)
