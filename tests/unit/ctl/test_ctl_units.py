"""Numbers in words."""

from __future__ import annotations

import pytest

from lightllmctl import units


@pytest.mark.parametrize(
    ("amount", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (98_362_432, "98.4 MB"), (999_600_000, "1.00 GB"),
     (205_000_000, "205 MB"), (16.4e9, "16.4 GB"), (3e12, "3.00 TB"), (5e15, "5000 TB")],
)  # fmt: skip
def test_sizes_have_three_digits(amount: float, words: str) -> None:
    assert units.size(amount) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0.0 s"), (0.42, "0.4 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min"), (185, "3 min 5 s"),
     (9240, "2 h 34 min"), (7200, "2 h"), (86_400 * 5 + 7200, "5 d 2 h")],
)  # fmt: skip
def test_durations_have_at_most_two_units(seconds: float, words: str) -> None:
    assert units.duration(seconds) == words


@pytest.mark.parametrize(
    ("amount", "words"), [(0, "0"), (6000, "6,000"), (99_999, "99,999"), (412_000, "412k"), (3_200_000, "3.2M")]
)
def test_counts(amount: float, words: str) -> None:
    assert units.count(amount) == words


def test_about_keeps_the_larger_unit() -> None:
    assert units.about(185) == "3 min"
