"""Parameters of tests that cost much: in the usual run few of their combinations, all of them in the long run and on a
GPU, where they cost little."""

from __future__ import annotations

import os
from itertools import combinations, product
from typing import Any

import pytest
import torch

LONG = bool(os.environ.get("LIGHTLLMD_LONG_TESTS"))
ALL = LONG or torch.cuda.is_available()


def covering(strength: int = 2, **parameters: list[Any]) -> pytest.MarkDecorator:
    """Parametrises a test with combinations in which all values of any `strength` parameters meet: 1 takes each value
    once, 2 each pair of values.

    Each combination is the first of those that have most of what is still missing (the greedy algorithm of Cohen et
    al., "The AETG System", 1997), so every run and every worker has the same.
    """
    every = list(product(*(range(len(values)) for values in parameters.values())))
    taken = every if ALL else []
    missing = set() if ALL else {part for row in every for part in _parts(row, strength)}
    while missing:
        taken.append(max(every, key=lambda row: len(missing.intersection(_parts(row, strength)))))
        missing.difference_update(_parts(taken[-1], strength))
    columns = list(parameters.values())
    rows = [tuple(column[at] for column, at in zip(columns, row, strict=True)) for row in taken]
    return pytest.mark.parametrize(tuple(parameters), rows)


def _parts(row: tuple[int, ...], strength: int) -> list[tuple[tuple[int, int], ...]]:
    """The choices of `strength` (parameter, value) pairs that meet in a combination."""
    return list(combinations(enumerate(row), strength))
