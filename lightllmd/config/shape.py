"""The sizes of a model, read out of its Hugging Face config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightllmd.errors import ConfigInvalid, Problem


@dataclass(frozen=True)
class Shape:
    """The sizes that memory depends on, in elements."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_norms: bool  # a norm over each query and key head

    @classmethod
    def of(cls, model_type: str, config: dict[str, Any]) -> Shape:
        """Raises ConfigInvalid when the model's config lacks one of them."""
        hidden, heads = dimension(config, "hidden_size"), dimension(config, "num_attention_heads")
        biased = bool(config.get("attention_bias", False))
        return cls(
            layers=dimension(config, "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=dimension(config, "num_key_value_heads", heads),
            head_dim=dimension(config, "head_dim", 128 if model_type == "qwen3" else max(1, hidden // heads)),
            intermediate=dimension(config, "intermediate_size"),
            vocab=dimension(config, "vocab_size"),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=biased or model_type == "qwen2",
            out_bias=biased and model_type != "qwen2",
            mlp_bias=bool(config.get("mlp_bias", False)) and model_type == "llama",
            head_norms=model_type == "qwen3",
        )

    @property
    def weight_elements(self) -> int:
        """Parameters, a tied head counted once."""
        attention = self.heads * self.head_dim
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim * (self.hidden + self.qkv_bias)
        out = self.hidden * (attention + self.out_bias)
        gate_up = 2 * self.intermediate * (self.hidden + self.mlp_bias)
        down = self.hidden * (self.intermediate + self.mlp_bias)
        norms = 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * (qkv + out + gate_up + down + norms) + self.hidden


def dimension(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """A size out of a Hugging Face config. Raises ConfigInvalid naming the key where it is none."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        state = "missing" if value is None else repr(value)
        message = f"the model's config: {key} is {state}, a positive integer is needed"
        raise ConfigInvalid([Problem("model_dir", message)])
    return value
