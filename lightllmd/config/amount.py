"""Bytes and counts in words."""

from __future__ import annotations


def size(amount: float) -> str:
    """Bytes in decimal units with three significant digits: 1.49 GB, 98.4 MB."""
    sign, amount = ("-" if amount < 0 else ""), abs(amount)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 999.5 or unit == "TB":
            break
        amount /= 1000
    digits = 0 if unit == "B" or amount >= 99.95 else 1 if amount >= 9.995 else 2
    return f"{sign}{amount:.{digits}f} {unit}"


def count(amount: int) -> str:
    """134.5 M"""
    return f"{amount / 1e9:.2f} G" if amount >= 1e9 else f"{amount / 1e6:.1f} M"
