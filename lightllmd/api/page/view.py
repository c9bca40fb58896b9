"""What the page shows, of what this api worker knows anyway; made anew for each request, waiting for nothing."""

from __future__ import annotations

import time
from typing import Literal

import msgspec

from lightllmd import __version__
from lightllmd.api.inflight.revision import Revision
from lightllmd.api.inflight.revisions import Revisions
from lightllmd.config.plan import Plan

# What the model is for: messages, plain text, or numbers alone.
Kind = Literal["chat", "text", "scores", "vectors"]
UNKNOWN = "–"


class WorkerShown(msgspec.Struct, frozen=True):
    """A line of the list of processes."""

    name: str
    said: str
    ready: bool


class View(msgspec.Struct, frozen=True):
    """Texts are ready to be shown, so that HTML and scripts say the same; none of them is HTML."""

    ready: bool
    health: str
    sentence: str  # what the daemon is doing
    kind: Kind
    rate: float  # tokens per second
    share: float  # of the KV cache, 0..1
    texts: dict[str, str]
    workers: list[WorkerShown]


def kind_of(revision: Revision) -> Kind:
    """By the plan and the tokenizer."""
    if revision.plan.scoring is not None:
        return "scores"
    if revision.plan.model is not None and revision.plan.model.pooling is not None:
        return "vectors"  # it was trained for that, whatever it could write
    return "chat" if revision.tokenizer.chat_template is not None else "text"


def health_of(revisions: Revisions) -> tuple[bool, str]:
    """As /readiness tells."""
    trouble = revisions.trouble
    return trouble is None, _capital(revisions.health.reason if trouble is None else trouble)


def view_of(revisions: Revisions) -> View:
    """All of it."""
    revision, overview = revisions.current, revisions.overview
    plan, load = revision.plan, revision.ledger.load
    ready, health = health_of(revisions)
    total = load.slots_total if load is not None else plan.max_total_token_num
    used = load.slots_used if load is not None else 0
    share = used / total if total else 0.0
    texts = {
        "model": revision.model_name,
        "device": device_of(plan),
        "context": f"{revision.limits.max_req_total_len:,} tokens",
        "generation": ", ".join(str(group.generation) for group in revision.ledger.groups) or UNKNOWN,
        "version": __version__,
        "running": f"{load.running:,}" if load is not None else "0",
        "waiting": f"{load.waiting + load.paused:,}" if load is not None else "0",
        "cache": f"{share:.0%} of {total:,} tokens",
        "rate": UNKNOWN,
        "held": UNKNOWN,
        "uptime": UNKNOWN,
        "requests": UNKNOWN,
    }
    if overview is None:  # it comes within a second
        return View(ready, health, "", kind_of(revision), 0.0, share, texts, [])
    rate = overview.tokens_per_second
    texts |= {
        "rate": f"{rate:,.1f}" if 0 < rate < 100 else f"{rate:,.0f}",
        "held": f"{overview.held:,}",
        "uptime": duration(time.time() - overview.started),
        "requests": _ends(overview.ok, overview.failed, overview.cancelled, overview.resumed),
    }
    workers = [WorkerShown(one.name, _said(one.said, one.restarts), one.ready) for one in overview.workers]
    return View(ready, health, overview.sentence, kind_of(revision), rate, share, texts, workers)


def device_of(plan: Plan) -> str:
    """What computes, and over how many processes."""
    tp = [f"tp {plan.ranks}"] if plan.ranks > 1 else []
    replicas = [f"{plan.replicas} replicas"] if plan.replicas > 1 else []
    return ", ".join([plan.device.kind, plan.data_type, *tp, *replicas])


def duration(seconds: float) -> str:
    """To the minute, so that it is the same for many requests in a row."""
    minutes = max(0, int(seconds)) // 60
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else "less than a minute"


def _said(said: str, restarts: int) -> str:
    return said if not restarts else f"{said}, restarted {'once' if restarts == 1 else f'{restarts:,} times'}"


def _ends(ok: int, failed: int, cancelled: int, resumed: int) -> str:
    counts = ((failed, "failed"), (cancelled, "cancelled"), (resumed, "resumed"))
    return ", ".join([f"{ok:,} answered", *(f"{count:,} {how}" for count, how in counts if count)])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
