"""Tiny random causal language models of transformers that no family of ours covers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from model_folders import TOKENIZER

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# By model type; prompts of the tests are longer than the windows.
CONFIGS: dict[str, dict[str, Any]] = {
    "mistral": {**GROUPED, "sliding_window": 8},
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**GROUPED, **EXPERTS, "head_dim": 16},
    "olmoe": {**GROUPED, **EXPERTS},
    "granitemoe": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 2.0},
    "deepseek_v2": {
        **COMMON,
        **LATENT,
        **EXPERTS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "phi": {**GROUPED, "partial_rotary_factor": 0.5},
    "phi3": GROUPED,
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": COMMON,
    "opt": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma": {**GROUPED, "head_dim": 16},
    "gemma3_text": {**GROUPED, **ALTERNATING, "head_dim": 16, "query_pre_attn_scalar": 24},
    "cohere": {**GROUPED, "logit_scale": 0.5},
    "cohere2": {**GROUPED, **ALTERNATING},
    "granite": {**GROUPED, "logits_scaling": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
    "stablelm": {**GROUPED, "partial_rotary_factor": 0.25},
    "starcoder2": {**GROUPED, "sliding_window": None},
    "olmo": GROUPED,
    "glm": {**GROUPED, "head_dim": 8},
    "nemotron": GROUPED,
    "smollm3": GROUPED,
    "diffllama": GROUPED,
}


def write_causal_lm(folder: Path, model_type: str, **changes: Any) -> Path:
    """A Hugging Face directory. Weights are drawn so that logits spread over a few units."""
    config = CONFIG_MAPPING[model_type](**{**CONFIGS[model_type], **changes})
    return save(folder, AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def save(folder: Path, model: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(drawn * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(drawn * 0.1)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder
