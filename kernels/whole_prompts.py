"""Attention of long rows that are fed as a whole, through cuDNN: a third faster there than our own kernel.

cuDNN plans each new shape for about a tenth of a second, so only shapes that `plan` has seen are used. A row is padded
to the next planned length where the padding costs less than cuDNN gains; equal rows of the shortest length go together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightllmd.kernels.layout import Heads, Span

STEP = 1024  # planned lengths are multiples of it
LEAST = 2048  # the shortest of them
WORTH = 1.2  # of padded length and length
TOGETHER = (8, 4, 2)  # rows of LEAST tokens

log = logging.getLogger(__name__)


def plan(layers: Iterable[Heads], dtype: torch.dtype, device: torch.device, longest: int) -> int:
    """Plans for rows of up to `longest` tokens. Returns the longest planned length, 0 without cuDNN or where a layer
    has a kind of attention that is not computed here: a soft cap, or a window that is shorter than the row."""
    kinds = {replace(heads, rotary=0, norm_offset=0.0) for heads in layers}
    if device.type != "cuda" or dtype is torch.float32:
        return 0
    if any(heads.dim > 128 or heads.soft_cap is not None for heads in kinds):
        return 0
    longest = min([longest, *(heads.window for heads in kinds if heads.window is not None)])
    lengths = range(LEAST, longest + 1, STEP)
    shapes = [(1, length) for length in lengths] + [(rows, LEAST) for rows in TOGETHER if rows * LEAST <= longest]
    try:
        for heads, (rows, length) in product(kinds, shapes):
            qkv = torch.zeros((rows * length, heads.query + 2 * heads.kv, heads.dim), dtype=dtype, device=device)
            attend(qkv, heads, Span(0, rows, length, length))
    except RuntimeError as refused:
        log.info("cuDNN has no attention for this device: %s", refused)
        return 0
    return max(lengths, default=0)


def spans(
    counts: Sequence[int], starts: Sequence[int], first: int, longest: int, causal: Sequence[bool] | None = None
) -> dict[int, Span]:
    """Which rows are to be computed here, in spans by the index of their first row; they are packed from `first` on.

    `longest` is what `plan` returned. `causal`: whether no token of a row sees later ones; None: of all rows.
    """
    found: dict[int, Span] = {}
    index = 0
    while index < len(counts):
        count, rows = counts[index], 1
        padded = -(-count // STEP) * STEP
        if starts[index] == 0 and (causal is None or causal[index]) and LEAST <= padded <= min(longest, WORTH * count):
            if count == LEAST:
                rows = _alike(counts[index:], starts[index:], longest, None if causal is None else causal[index:])
            found[index] = Span(first, rows, count, padded)
        first += rows * count
        index += rows
    return found


def _alike(counts: Sequence[int], starts: Sequence[int], longest: int, causal: Sequence[bool] | None) -> int:
    """How many of the first rows go together: all whole, causal, and of LEAST tokens."""
    for rows in TOGETHER:
        if (
            rows * LEAST <= longest
            and list(counts[:rows]) == [LEAST] * rows
            and not any(starts[:rows])
            and (causal is None or all(causal[:rows]))
        ):
            return rows
    return 1


def attend(qkv: Tensor, heads: Heads, span: Span) -> Tensor:
    """``qkv [T, H + 2K, D]`` -> ``[rows * count, H, D]`` of the span's tokens, which may be a view of more."""
    part = qkv[span.first : span.first + span.rows * span.count].unflatten(0, (span.rows, span.count))
    if span.padded > span.count:
        part = functional.pad(part, (0, 0, 0, 0, 0, span.padded - span.count))
    q, k, v = part.transpose(1, 2).split([heads.query, heads.kv, heads.kv], 1)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=heads.scale, enable_gqa=True)
    return out.transpose(1, 2)[:, : span.count].reshape(span.rows * span.count, heads.query, heads.dim)
