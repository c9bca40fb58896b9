"""The figures of a load as people read them."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from lightllmctl import units
from lightllmctl.render import BAD, GOOD, STRONG, clean, table

NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "latency": "latency"}
COLUMNS = ("mean", "p50", "p90", "p99", "max")


def page(report: dict[str, Any]) -> Text:
    """``report`` as `figures.summary` makes it."""
    text = Text()
    for name, value in _lines(report):
        text.append(f"{name:<10}", STRONG).append_text(value).append("\n")
    rows = [
        (NAMES[name], *(f"{1000 * report[name][column]:,.1f}" for column in COLUMNS))
        for name in NAMES
        if report[name] is not None
    ]
    if rows:
        text.append("\n").append_text(table(("MS", *(name.upper() for name in COLUMNS)), rows, right=range(1, 6)))
    text.rstrip()
    return text


def _lines(report: dict[str, Any]) -> list[tuple[str, Text]]:
    ok, asked = report["ok"], report["requests"]
    lines = [
        ("requests", Text(f"{ok:,} of {asked:,} ok", GOOD if ok == asked else BAD)),
        ("duration", Text(units.duration(report["duration"]))),
        ("input", Text(f"{report['input_tokens']:,} tokens")),
        ("output", Text(f"{report['output_tokens']:,} tokens, {report['output_tokens_per_second']:,.1f} tokens/s")),
        ("rate", Text(f"{report['requests_per_second']:.2f} requests/s")),
    ]
    if goodput := report.get("goodput"):
        bounds = ", ".join(f"{name} <= {bound:g} s" for name, bound in goodput["slo"].items())
        said = f"{goodput['requests_per_second']:.2f} requests/s, {goodput['share']:.1%} of all ({bounds})"
        lines.append(("goodput", Text(said)))
    for kind, count in report["failures"].items():
        detail = report["failure_details"].get(kind, "")
        lines.append(("failed", Text(clean(f"{count:,} x {kind}{': ' if detail else ''}{detail}"), BAD)))
    return lines
