"""From the records of a load to its figures. Pure arithmetic; all times in seconds.

TTFT: from the moment a request was due to its first token. ITL: between two events of a stream that carried tokens
(0 for events that were read together). TPOT: a request's time per token after its first,
``(last event - first event) / (tokens - 1)``. Latency: from the due moment to the answer's end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightllmctl.answer import Record

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
MEASURES = ("ttft", "tpot", "itl", "latency")
SLO_KEYS = ("ttft", "tpot", "latency")


def parse_slo(text: str) -> dict[str, float]:
    """``ttft=1,tpot=0.05`` in seconds. Raises ValueError."""
    slo = {}
    for part in text.split(","):
        name, _, bound = part.partition("=")
        if name.strip() not in SLO_KEYS:
            raise ValueError(f"{part!r}: of the form NAME=SECONDS, with a name out of {', '.join(SLO_KEYS)}")
        try:
            slo[name.strip()] = float(bound)
        except ValueError:
            raise ValueError(f"{part!r}: {bound!r} is no number of seconds") from None
        if not slo[name.strip()] > 0:
            raise ValueError(f"{part!r}: should be above 0")
    return slo


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of ascending values, linear between two of them."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(values: list[float]) -> dict[str, float] | None:
    """Mean, quantiles and maximum; None of nothing."""
    if not values:
        return None
    values = sorted(values)
    quantiles = {name: quantile(values, share) for name, share in QUANTILES.items()}
    return {"mean": sum(values) / len(values), **quantiles, "max": values[-1]}


def of_request(record: Record) -> dict[str, float]:
    """Its measures; without tpot where it has one token."""
    found = {"ttft": record.times[0] - record.start, "latency": record.end - record.start}
    if record.tokens > 1:
        found["tpot"] = (record.times[-1] - record.times[0]) / (record.tokens - 1)
    return found


def summary(records: list[Record], slo: dict[str, float] | None = None) -> dict[str, Any]:
    """Everything that is reported. Failed requests count in `failures`, `requests` and the duration only."""
    good = [record for record in records if not record.failure and record.times]
    duration = max(record.end for record in records) - min(record.start for record in records)
    each = [of_request(record) for record in good]
    gaps = [later - earlier for record in good for earlier, later in zip(record.times, record.times[1:], strict=False)]
    values = {name: [one[name] for one in each if name in one] for name in MEASURES} | {"itl": gaps}
    tokens = sum(record.tokens for record in good)
    bad = [record for record in records if record.failure or not record.times]
    report: dict[str, Any] = {
        "requests": len(records),
        "ok": len(good),
        "failures": dict(Counter(record.failure or "no token" for record in bad)),
        "failure_details": {record.failure: record.detail for record in bad if record.failure},  # one of each kind
        "duration": duration,
        "input_tokens": sum(record.prompt_tokens for record in good),
        "output_tokens": tokens,
        "output_tokens_per_second": tokens / duration,
        "requests_per_second": len(good) / duration,
        **{name: spread(values[name]) for name in MEASURES},
    }
    if slo:
        met = sum(all(one.get(name, 0.0) <= bound for name, bound in slo.items()) for one in each)
        report["goodput"] = {"slo": slo, "met": met, "share": met / len(records), "requests_per_second": met / duration}
    return report
