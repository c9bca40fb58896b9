"""The decoder's part of a vision model's config, completed: it leaves out what its class has by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightllmd.architecture.entries import not_built, switch, table, word

_QWEN2_VL = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
# What transformers' classes (and InternLM2's own) have where a config says nothing.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3_vl_text": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 128000,
    },
    "gemma3_text": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
    },
    "internlm2": {
        "vocab_size": 103168,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "bias": True,
    },
}
# What is said of the whole model.
_COMMON = ("quantization_config", "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id")


def nested(config: Mapping[str, Any], key: str, usual: str = "llama", windowed: bool = False) -> dict[str, Any]:
    """The decoder's config, which is `config`'s entry `key`. `usual`: its type where it names none; `windowed`: its
    family reads ``use_sliding_window``, others have no such layers. Raises ConfigInvalid."""
    part = table(config, key)
    kind = word(part, "model_type") or usual
    part = {name: value for name, value in part.items() if value is not None or name not in DEFAULTS.get(kind, {})}
    if not windowed and switch(part, "use_sliding_window"):
        raise not_built("use_sliding_window: attention over a sliding window is not available yet")
    common = {name: config[name] for name in _COMMON if config.get(name) is not None and part.get(name) is None}
    tied = any(switch(each, "tie_word_embeddings") for each in (part, config))
    return {
        **DEFAULTS.get(kind, {}),
        **common,
        **part,
        "model_type": kind,
        "architectures": None,
        "tie_word_embeddings": tied,
    }


def own_head_counts(config: Mapping[str, Any]) -> bool:
    """Whether a head that a checkpoint of a vision model has beside its embedding is the model's, although its
    decoder's config says that the two are one: only what is said of the whole model makes them one."""
    return config.get("tie_word_embeddings") is not True
