"""Philox4x32-10, the counter-based random number generator of Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (SC 2011), and the noise that draws are made of. Stateless: the same key and counter give the same numbers,
whatever ran before or beside.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
_LOW = 0xFFFFFFFF
# Tokens t and t + RUN, t + 2 RUN, t + 3 RUN (of a chunk of 4 RUN) get the four words of one call.
RUN = 1024

Words = NDArray[np.uint64]  # each an unsigned 32-bit word, so that products of two fit


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Four words per element of the counter's arrays, which have one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        left, right = c0 * np.uint64(MULTIPLIER_0), c2 * np.uint64(MULTIPLIER_1)
        c0, c1, c2, c3 = _high(right) ^ c1 ^ np.uint64(k0), _low(right), _high(left) ^ c3 ^ np.uint64(k1), _low(left)
        k0, k1 = (k0 + WEYL_0) & _LOW, (k1 + WEYL_1) & _LOW
    return c0, c1, c2, c3


def _high(words: Words) -> Words:
    return words >> np.uint64(32)


def _low(words: Words) -> Words:
    return words & np.uint64(_LOW)


def gumbel(seed: int, branch: int, position: int, vocab: int) -> Tensor:
    """Standard Gumbel noise ``[vocab]`` fp32, one per token id, of one row's draw.

    Minus the logarithm of an exponential variable: the largest noise, which decides a draw, comes from the smallest u
    and is the finest grained.
    """
    calls = np.arange(-(-vocab // (4 * RUN)) * RUN, dtype=np.uint64)
    fixed = [np.full_like(calls, word & _LOW) for word in (position, branch, 1)]
    words = philox((fixed[0], fixed[1], calls, fixed[2]), (seed & _LOW, seed >> 32 & _LOW))
    ordered = np.stack([word.reshape(-1, RUN) for word in words], 1).reshape(-1)[:vocab]
    u = ((torch.from_numpy(ordered.astype(np.float32)) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -(-(-u).log1p()).log()
