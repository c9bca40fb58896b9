"""The names that the documented `mode` parameter takes."""

from __future__ import annotations

import re

MODES = (
    "triton_int8kv",
    "ppl_int8kv",
    "ppl_int8kv_flashdecoding",
    "ppl_int4kv_flashdecoding",
    "ppl_fp16",
    "ppl_fp16_flashdecoding",
    "triton_flashdecoding",
    "triton_gqa_attention",
    "triton_gqa_flashdecoding",
    "triton_w4a16",
    "triton_w8a16",
    "triton_w8a8",
    "lmdeploy_w4a16",
    "ppl_w4a16",
    "ppl_w8a8",
    "ppl_w8a8_mixdown",
    "flash_llm_w6a16",
    "quik_activation_weight",
)

ALIASES = {
    "triton_int8weight": "triton_w8a16",
    "triton_int4weight": "triton_w4a16",
    "lmdeploy_int4weight": "lmdeploy_w4a16",
    "ppl_int4weight": "ppl_w4a16",
}

NAMES = (*MODES, *ALIASES)


def is_mode(name: str) -> bool:
    """`gN` (such as g64) is the group size of the 4-bit modes."""
    return name in NAMES or re.fullmatch(r"g[1-9]\d*", name) is not None
