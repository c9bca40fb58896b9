"""A value that a plan has in force, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightllmd.config.parameters import Params

AUTO_PREFILL = 8192  # tokens


@dataclass(frozen=True)
class Value:
    """No reason means that it is as written."""

    value: Any
    reason: str = ""


def batch_max_tokens(params: Params) -> Value:
    """A step holds the longest request, or with splitfuse_mode a block of its prompt."""
    if params.batch_max_tokens is not None:
        return Value(params.batch_max_tokens)
    key = "splitfuse_block_size" if params.splitfuse_mode else "max_req_total_len"
    least, slots = getattr(params, key), params.max_total_token_num
    if slots == "auto":
        return Value(max(AUTO_PREFILL, least), f"max({AUTO_PREFILL}, {key}), max_total_token_num being auto")
    return Value(max(slots // 6, least), f"max(max_total_token_num / 6 = {slots // 6}, {key} = {least})")
