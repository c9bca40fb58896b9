"""Rows of the parameter table that the sampling kernels read, and logits for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightllmd.kernels import sampling_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRAWN, LIMITED, PENALISED = sampling_rows.DRAWN.value, sampling_rows.LIMITED.value, sampling_rows.PENALISED.value
ENDING = sampling_rows.ENDING.value


def packed(vocab: int, **settings: Any) -> np.ndarray:
    """A plain greedy row with some settings changed; the flags follow from them, except `drawn`."""
    row = np.zeros((), sampling_rows.PARAMETERS)
    row["inverse_temperature"], row["top_p"], row["top_k"], row["repetition"], row["decay_factor"] = 1, 2, vocab, 1, 1
    drawn = settings.pop("drawn", False)
    for name, value in settings.items():
        row[name] = value
    row["flags"] = (
        DRAWN * drawn
        | LIMITED * bool(drawn and (row["top_p"] < 1 or row["top_k"] < vocab or row["min_p"] > 0))
        | PENALISED * bool(row["repetition"] != 1 or row["presence"] != 0 or row["frequency"] != 0)
        | ENDING * bool(row["decay_factor"] != 1 or row["min_new"] > 1)
    )
    return row[()]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
