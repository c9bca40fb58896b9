"""The names that the documented `mode` parameter takes, and what those that are built mean."""

from __future__ import annotations

import re
from dataclasses import dataclass

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


@dataclass(frozen=True)
class DecodeMode:
    """A mode that selects the attention of decode steps. All of them run on a GPU only, and one at a time."""

    does: str
    data_type: str = ""  # the only one it computes in


BUILT = {
    "triton_flashdecoding": DecodeMode("rows cut into segments, each query head by itself"),
    "triton_gqa_attention": DecodeMode("query heads that share keys and values together, rows not cut"),
    "triton_gqa_flashdecoding": DecodeMode("rows cut, heads together"),
    "ppl_fp16": DecodeMode("the same, in float16", data_type="float16"),
}
UNBUILT = (*(name for name in MODES if name not in BUILT), "gN")

DECODE_MODES = (
    "On a GPU one mode may select the attention of decode steps: "
    + ", ".join(f"{name} ({mode.does})" for name, mode in BUILT.items())
    + "; unset, the best for each shape is taken."
)


def is_mode(name: str) -> bool:
    """`gN` (such as g64) is the group size of the 4-bit modes."""
    return name in NAMES or re.fullmatch(r"g[1-9]\d*", name) is not None


def decode_modes(names: list[str]) -> list[str]:
    """Those of `names` that select the attention of decode steps, each once."""
    return [name for name in dict.fromkeys(names) if name in BUILT]
