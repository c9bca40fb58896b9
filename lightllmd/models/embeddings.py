"""Vectors of hidden states, for embeddings: of single tokens, or the sum of several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightllmd.config.bounds import POOLED_ROWS
from lightllmd.models.language_model import LanguageModel


def owners_of(counts: Sequence[tuple[int, bool]]) -> list[int]:
    """The vector that each place becomes a part of. `counts`: of each row its places, and whether these are summed."""
    owners: list[int] = []
    vectors = 0
    for places, summed in counts:
        owners += [vectors] * places if summed else range(vectors, vectors + places)
        vectors += min(1, places) if summed else places
    return owners


def vectors_of(model: LanguageModel, hidden: Tensor, places: Tensor, owners: Tensor, first: Sequence[int]) -> Tensor:
    """fp32 ``[V, hidden]`` of the rows ``places [P]`` of ``hidden [T, hidden]``: vector v is the sum of the normed
    hidden states that ``owners [P]``, ascending from 0, says are its. POOLED_ROWS of them exist at a time. `first` are
    the same owners on the host.

    The sums are a product with ones and zeros, so that they come out the same each time and take two launches."""
    sums = hidden.new_zeros((first[-1] + 1, hidden.shape[1]), dtype=torch.float32)
    for begin in range(0, len(first), POOLED_ROWS):
        end = min(begin + POOLED_ROWS, len(first))
        low, high = first[begin], first[end - 1] + 1
        states = model.states(hidden, places[begin:end])
        if high - low == end - begin:
            sums[low:high] += states
            continue
        numbers = torch.arange(low, high, device=hidden.device, dtype=owners.dtype)
        sums[low:high] += (owners[None, begin:end] == numbers[:, None]).float() @ states
    return sums
