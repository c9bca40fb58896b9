"""Numbers in words: bytes, counts, durations, instants."""

from __future__ import annotations

import time


def size(amount: float) -> str:
    """Bytes in decimal units with three significant digits: 98.4 MB, 16.4 GB, 205 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.5:
            return f"{amount:.0f} B" if unit == "B" else f"{_three(amount)} {unit}"
        amount /= 1000
    return f"{_three(amount)} TB"


def _three(amount: float) -> str:
    return f"{amount:.{2 if amount < 9.995 else 1 if amount < 99.95 else 0}f}"


def count(amount: float) -> str:
    """18,204 below 100,000; 412k and 3.2M above."""
    if amount < 100_000:
        return f"{amount:,.0f}"
    return f"{amount / 1e3:.0f}k" if amount < 999_500 else f"{amount / 1e6:.1f}M"


def duration(seconds: float) -> str:
    """At most two units: 0.4 s, 38 s, 3 min 5 s, 2 h 34 min, 5 d 2 h."""
    seconds = max(seconds, 0.0)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return _two(whole // 60, "min", whole % 60, "s")
    if whole < 86400:
        return _two(whole // 3600, "h", whole % 3600 // 60, "min")
    return _two(whole // 86400, "d", whole % 86400 // 3600, "h")


def _two(major: int, major_unit: str, minor: int, minor_unit: str) -> str:
    return f"{major} {major_unit} {minor} {minor_unit}" if minor else f"{major} {major_unit}"


def about(seconds: float) -> str:
    """The larger unit alone: "3 min", "2 h"."""
    return " ".join(duration(seconds).split(" ")[:2])


def instant(at: float) -> str:
    """Sun 2026-11-22 08:12:31 UTC, in the local time zone."""
    return time.strftime("%a %Y-%m-%d %H:%M:%S %Z", time.localtime(at))


def stamp(at: float) -> str:
    """Nov 22 10:43:12, as a log line begins."""
    return time.strftime("%b %d %H:%M:%S", time.localtime(at))
