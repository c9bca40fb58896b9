"""Tiny random models of the Qwen vision-language families, as transformers makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vision_models import write_vision_model

IMAGE, START, END = 100, 101, 102  # ids of tokens
_TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 120,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": 103, "vision_start_token_id": START, "vision_end_token_id": END}
# Attention in the windows of qwen2_5_vl sees squares of 2 x 2 tokens.
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "depth": 3,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 56,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "depth": 3,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 56,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    },
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 20},
    "qwen2_5_vl": {"size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 20}, "resample": 2},
    "qwen3_vl": {
        "size": {"shortest_edge": 32 * 32 * 2, "longest_edge": 32 * 32 * 16},
        "patch_size": 16,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}


def config_of(kind: str, **text: Any) -> dict[str, Any]:
    """config.json of a checkpoint; `text`: changed entries of its decoder."""
    heads = {"head_dim": 16} if kind == "qwen3_vl" else {}
    return {"model_type": kind, "text_config": {**_TEXT, **heads, **text}, "vision_config": VISION[kind], **_TOKENS}


def write_qwen_vl(folder: Path, kind: str, *, native: bool = False) -> Any:
    """On disk; and transformers' model of it."""
    config = AutoConfig.for_model(**config_of(kind))
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    settings = {"image_processor_type": "Qwen2VLImageProcessor", **PROCESSORS[kind]}
    write_vision_model(folder, model, settings, native=native)
    return model


def processor_of(kind: str) -> Any:
    """transformers' own, with pillow."""
    return Qwen2VLImageProcessorPil(**PROCESSORS[kind])
