"""Numbers as bytes: what vLLM's clients may ask for instead of JSON's decimals."""

from __future__ import annotations

import sys
from array import array
from base64 import b64encode
from collections.abc import Sequence
from itertools import chain
from struct import Struct

_FLOAT16_MOST = 65504.0


def base64_of(vectors: Sequence[Sequence[float]], dtype: str, endianness: str) -> str:
    """The numbers of all vectors one behind the other. `dtype`: float32, float16 or bfloat16; `endianness`: native,
    big or little."""
    numbers = array("f", chain.from_iterable(vectors))
    packed = numbers if dtype == "float32" else _halved(numbers, dtype)
    if endianness not in ("native", sys.byteorder):
        packed.byteswap()
    return b64encode(packed).decode()


def _halved(numbers: array[float], dtype: str) -> array[int]:
    """Of two bytes each, rounded to the nearest, of two nearest to the even one; beyond what float16 has: infinite."""
    halves = array("H")
    if dtype == "float16":
        pack = Struct("=e").pack
        halves.frombytes(b"".join(pack(_within(number)) for number in numbers))
        return halves
    bits = array("I", numbers.tobytes())
    halves.extend((bit + 0x7FFF + (bit >> 16 & 1)) >> 16 for bit in bits)
    return halves


def _within(number: float) -> float:
    return number if abs(number) < _FLOAT16_MOST + 16 else float("inf") * (1 if number > 0 else -1)
