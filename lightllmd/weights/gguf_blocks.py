"""GGML's blocks as the values and scales of a quantised matrix, without arithmetic.

Formats: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Blocks = tuple[np.ndarray, np.ndarray]  # values ``[blocks, elements]``, scales ``[blocks, groups]``

Q4_0_ZERO = 8


def _q4_0(blocks: np.ndarray) -> Blocks:
    """fp16 scale; 16 bytes: the low halves are the first elements."""
    nibbles = blocks[:, 2:]
    return np.concatenate([nibbles & 15, nibbles >> 4], 1), _halves(blocks[:, :2])


def _q5_0(blocks: np.ndarray) -> Blocks:
    """fp16 scale; the highest bits of 32 elements; 16 bytes as those of Q4_0. Less 16."""
    high = np.unpackbits(np.ascontiguousarray(blocks[:, 2:6]), axis=1, bitorder="little")
    nibbles = blocks[:, 6:]
    low = np.concatenate([nibbles & 15, nibbles >> 4], 1)
    return (low | (high << 4)).view(np.int8) - np.int8(16), _halves(blocks[:, :2])


def _q8_0(blocks: np.ndarray) -> Blocks:
    """fp16 scale; 32 bytes."""
    return blocks[:, 2:].view(np.int8), _halves(blocks[:, :2])


def _q6_k(blocks: np.ndarray) -> Blocks:
    """The low halves of 256 elements, their highest two bits, an int8 scale for each 16, an fp16 scale. Less 32."""
    count = len(blocks)
    low = blocks[:, :128].reshape(count, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)
    high = blocks[:, 128:192].reshape(count, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    values = (low & 15).reshape(count, 256) | ((high & 3).reshape(count, 256) << 4)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32) * _halves(blocks[:, 208:]).astype(np.float32)
    return values.view(np.int8) - np.int8(32), scales


def _halves(stored: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(stored).view(np.float16)


UNPACKED: dict[str, Callable[[np.ndarray], Blocks]] = {"Q4_0": _q4_0, "Q5_0": _q5_0, "Q8_0": _q8_0, "Q6_K": _q6_k}
