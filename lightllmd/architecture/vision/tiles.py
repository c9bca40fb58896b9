"""Images cut into the tiles of a grid of their own shape, with the whole image as one more tile behind them: InternVL
(Chen et al. 2024, "How Far Are We to GPT-4V?")."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lightllmd.architecture.vision.layout import ImageLayout


@dataclass(frozen=True)
class TiledLayout(ImageLayout):
    """Of `rows` x `columns` tiles, row by row, and one of the whole image where there are several."""

    rows: int = 1
    columns: int = 1


@dataclass(frozen=True)
class Tiles:
    """A `Geometry`: the grid of `fewest` to `largest` tiles whose shape is closest to the image's."""

    square: int  # pixels a side of a tile
    tokens: int  # of a tile
    fewest: int
    largest: int
    resample: int
    thumbnail: bool = True

    def layout(self, width: int, height: int) -> TiledLayout:
        """See `Geometry.layout`."""
        rows, columns = self._grid(width, height)
        tiles = rows * columns
        tiles += self.thumbnail and tiles > 1
        return TiledLayout(self.tokens * tiles, tiles=tiles, rows=rows, columns=columns)

    @property
    def most(self) -> ImageLayout:
        """See `Geometry.most`."""
        tiles = self.largest + (self.thumbnail and self.largest > 1)
        return ImageLayout(self.tokens * tiles, tiles=tiles)

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns). Of grids that are as close, the one with more tiles, up to twice the image's area."""
        best, closest = (1, 1), float("inf")
        for rows, columns in _grids(self.fewest, self.largest):
            away = abs(width / height - columns / rows)
            small = width * height <= 0.5 * self.square**2 * rows * columns
            if away < closest or (away == closest and not small):
                best, closest = (rows, columns), away
        return best


@lru_cache(maxsize=16)
def _grids(fewest: int, largest: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns), those with fewer tiles first."""
    found = [
        (rows, columns)
        for columns in range(1, largest + 1)
        for rows in range(1, largest // columns + 1)
        if rows * columns >= fewest
    ]
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))
