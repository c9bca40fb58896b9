"""The dtypes that models compute in, by torch's names."""

from __future__ import annotations

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}  # of one element
