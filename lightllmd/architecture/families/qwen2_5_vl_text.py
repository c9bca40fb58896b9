"""The text part of Qwen2.5-VL (``model_type = "qwen2_5_vl_text"``): Qwen2-VL's (Bai et al. 2025, "Qwen2.5-VL")."""

from __future__ import annotations

from lightllmd.architecture.families import llama, qwen2_vl_text
from lightllmd.architecture.family import Family

FAMILY = Family("qwen2_5_vl_text", qwen2_vl_text.spec, llama.NAMES, llama.ROTARY_TABLES)
