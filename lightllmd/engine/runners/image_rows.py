"""How the embeddings of a step's images come to the device: in one copy, from pinned memory on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lightllmd.engine.runners.transfers import send
from lightllmd.engine.step import Row
from lightllmd.kernels.layout import ImageRows


def image_rows(
    rows: Sequence[Row], firsts: Sequence[int], dtype: torch.dtype, device: torch.device
) -> ImageRows | None:
    """`firsts`: where each row's first token lies among the step's. None: no row has an image."""
    placed = [(first + part.first, part) for row, first in zip(rows, firsts, strict=True) for part in row.images or ()]
    if not placed:
        return None
    values = np.concatenate(
        [np.frombuffer(part.values, np.uint8).reshape(part.layers, part.rows, -1) for _, part in placed], axis=1
    )
    places = np.concatenate([np.arange(first, first + part.rows) for first, part in placed])
    return ImageRows(send(places, device), send(values, device).view(dtype))
