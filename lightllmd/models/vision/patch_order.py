"""In which order the patches of images of different sizes are packed, and which of them attend to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Grid = tuple[int, int]  # rows and columns of an image's tokens


@dataclass(frozen=True)
class PatchRun:
    """`count` groups of `length` patches each, packed one behind the other from `first` on: the patches of a group
    attend to each other."""

    first: int
    count: int
    length: int


def positions(grid: Grid, merge: int) -> NDArray[np.int64]:
    """``[2, T]``: row and column of each patch of an image of `grid`, those of a token one
    behind the other."""
    rows, columns = grid[0] * merge, grid[1] * merge
    both = np.indices((rows, columns)).reshape(2, grid[0], merge, grid[1], merge)
    return both.transpose(0, 1, 3, 2, 4).reshape(2, -1)


def wholes(grids: Sequence[Grid], patches: int) -> list[PatchRun]:
    """Each image is a group. `patches` of a token."""
    return runs([rows * columns * patches for rows, columns in grids])


def windows(grids: Sequence[Grid], side: int, patches: int) -> tuple[NDArray[np.int64], list[PatchRun]]:
    """Squares of `side` x `side` tokens, smaller at an image's right and lower edges, are groups. Those with as many
    tokens are packed one behind the other, whatever images they are of, so that there are few runs: returns the tokens
    in that order, as their places among those of all images."""
    lengths: list[NDArray[np.int64]] = []
    places: list[NDArray[np.int64]] = []
    first = groups = 0
    for rows, columns in grids:
        row, column = np.indices((rows, columns)).reshape(2, -1)
        window = (row // side) * -(-columns // side) + column // side
        lengths.append(np.bincount(window)[window])
        places.append(window + groups)
        groups += int(window[-1]) + 1
        first += rows * columns
    of_window, length = np.concatenate(places), np.concatenate(lengths)
    order = np.lexsort((np.arange(first), of_window, -length))
    begins = np.flatnonzero(np.diff(of_window[order], prepend=-1))
    return order, runs([int(count) * patches for count in length[order][begins]])


def runs(lengths: Sequence[int]) -> list[PatchRun]:
    """Of groups with these lengths, packed in this order."""
    found: list[PatchRun] = []
    first = 0
    for length in lengths:
        if found and found[-1].length == length:
            found[-1] = PatchRun(found[-1].first, found[-1].count + 1, length)
        else:
            found.append(PatchRun(first, 1, length))
        first += length
    return found
