"""Philox4x32-10, the counter-based random number generator of Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (SC 2011). Stateless: the same key and counter give the same numbers, whatever ran before or beside.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
_LOW = 0xFFFFFFFF
# Tokens t and t + RUN, t + 2 RUN, t + 3 RUN (of a chunk of 4 RUN) get the four words of one call.
RUN = 1024


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words per element. All tensors are int64 of one shape, each element an unsigned 32-bit word.

    Products of two words use all 64 bits: int64 wraps, and its bits are those of the unsigned product.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        left, right = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1, c2, c3 = (right >> 32 & _LOW) ^ c1 ^ k0, right & _LOW, (left >> 32 & _LOW) ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + WEYL_0) & _LOW, (k1 + WEYL_1) & _LOW
    return c0, c1, c2, c3


def uniform(seed: Tensor, branch: Tensor, position: Tensor) -> Tensor:
    """Doubles in (0, 1), 48 random bits each, one per element of the int64 tensors `seed`, `branch`, `position`."""
    zero = torch.zeros_like(seed)
    words = philox((position & _LOW, branch & _LOW, zero, zero), (seed & _LOW, seed >> 32 & _LOW))
    return ((words[0] << 16 | words[1] >> 16).double() + 0.5) * 2.0**-48


def gumbel(seed: int, branch: int, position: int, vocab: int) -> Tensor:
    """Standard Gumbel noise ``[vocab]`` fp32, one per token id, of one row's draw.

    Minus the logarithm of an exponential variable, -log(1 - u), which is summed as a series where u is small: the
    largest noise, which decides a draw, comes from the smallest u and is the finest grained.
    """
    calls = torch.arange(-(-vocab // (4 * RUN)) * RUN)
    fixed = [torch.full_like(calls, word & _LOW) for word in (position, branch, 1, seed, seed >> 32)]
    words = philox((fixed[0], fixed[1], calls, fixed[2]), (fixed[3], fixed[4]))
    ordered = torch.stack([word.view(-1, RUN) for word in words], 1).flatten()[:vocab]
    u = ((ordered.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    series = u + u * u * (0.5 + u * (1 / 3 + u / 4))
    return -torch.where(u < 2.0**-6, series, -(1 - u).log()).log()
