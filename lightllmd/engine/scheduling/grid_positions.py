"""Rotary positions of a prompt with images, where they are in the images' grids (Wang et al. 2024, "Qwen2-VL")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class GridSpan(Protocol):
    """The tokens of one image: as `ipc.messages.ImageSpan`."""

    @property
    def start(self) -> int:
        """Index of the first one in the prompt."""

    @property
    def tokens(self) -> int:
        """How many there are."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of them: their product is `tokens`."""


class GridPositions:
    """Frame, row and column of each token of a sequence whose prompt has images.

    Three equal numbers of text, counted up. Those of an image begin where text would have gone on, each counted by
    itself, the columns of a row first; the text behind goes on behind the largest of them. So an image of R rows and C
    columns takes max(R, C) positions, and what is behind it has smaller positions than indices.
    """

    def __init__(self, images: Sequence[GridSpan]) -> None:
        """`images` are in the order of their places, and do not overlap."""
        self._images = images
        self._shifts: list[int] = []  # of the tokens of each image and the text before it: position - index of text
        self.shift = 0  # of all that is behind the last image
        for image in images:
            self._shifts.append(self.shift)
            self.shift += max(image.grid) - image.tokens

    def of(self, start: int, end: int) -> bytes | None:
        """See `step.Row.positions`: of the tokens from index `start` to before `end`. None where all three are the
        index + `shift`."""
        if not self._images or (start >= self._images[-1].start + self._images[-1].tokens):
            return None
        positions = np.empty((3, end - start), "<i4")
        behind = start  # what is before it is done
        for image, shift in zip(self._images, self._shifts, strict=True):
            first, last = image.start, image.start + image.tokens
            if last <= behind:
                continue
            if first > behind:
                stop = min(first, end)
                positions[:, behind - start : stop - start] = np.arange(behind + shift, stop + shift)
                behind = stop
            if behind == end:
                break
            stop = min(last, end)
            within = np.unravel_index(np.arange(behind - first, stop - first), image.grid)
            positions[:, behind - start : stop - start] = np.stack(within) + (first + shift)
            behind = stop
        positions[:, behind - start :] = np.arange(behind + self.shift, end + self.shift)
        return positions.tobytes()
