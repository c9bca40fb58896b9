"""Parameters of tests that cost much: in the usual run few of their combinations, all of them in the long run and on a
GPU, where they cost little."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product
from typing import Any

import pytest
import torch

from long_run import LONG

ALL = LONG or torch.cuda.is_available()


def covering(strength: int = 2, **parameters: list[Any]) -> pytest.MarkDecorator:
    """Parametrises a test with a covering array of the values of its parameters."""
    return pytest.mark.parametrize(tuple(parameters), covering_array(list(parameters.values()), strength))


def covering_array(
    columns: list[list[Any]],
    strength: int,
    allowed: Callable[[tuple[Any, ...]], bool] = lambda row: True,
    whole: bool = ALL,
) -> list[tuple[Any, ...]]:
    """Rows of one value of each column, in which all values of any `strength` columns meet that meet in an allowed
    row: 1 takes each value, 2 each pair of values.

    Each row is the first of those with most of what is still missing (the greedy algorithm of Cohen et al., "The AETG
    System", 1997), so every run and every worker has the same. `whole`: every allowed row.
    """
    numbered = product(*(range(len(column)) for column in columns))
    rows = {numbers: tuple(column[at] for column, at in zip(columns, numbers, strict=True)) for numbers in numbered}
    every = [numbers for numbers, row in rows.items() if allowed(row)]
    taken = every if whole else []
    missing = set() if whole else {part for numbers in every for part in _parts(numbers, strength)}
    while missing:
        taken.append(max(every, key=lambda numbers: len(missing.intersection(_parts(numbers, strength)))))
        missing.difference_update(_parts(taken[-1], strength))
    return [rows[numbers] for numbers in taken]


def _parts(numbers: tuple[int, ...], strength: int) -> list[tuple[tuple[int, int], ...]]:
    """The choices of `strength` (column, value) pairs that meet in a row."""
    return list(combinations(enumerate(numbers), strength))
