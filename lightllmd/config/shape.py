"""The sizes of a model, read out of its Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightllmd.config.check import show
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
        biased = switch(config, "attention_bias")
        return cls(
            layers=dimension(config, "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=dimension(config, "num_key_value_heads", heads),
            head_dim=dimension(config, "head_dim", 128 if model_type == "qwen3" else max(1, hidden // heads)),
            intermediate=dimension(config, "intermediate_size"),
            vocab=dimension(config, "vocab_size"),
            tied=switch(config, "tie_word_embeddings"),
            qkv_bias=biased or model_type == "qwen2",
            out_bias=biased and model_type != "qwen2",
            mlp_bias=switch(config, "mlp_bias") and model_type == "llama",
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


# The largest sizes that are believed, well above any known model's: beyond them arithmetic and loops would not end.
MOST = {
    "num_hidden_layers": 4096,
    "hidden_size": 1 << 20,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 14,
    "intermediate_size": 1 << 32,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 31,
    "original_max_position_embeddings": 1 << 31,
}


def dimension(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A size out of a Hugging Face config. Raises ConfigInvalid naming the key where it is none."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST[key]:
        raise _wrong(key, value, f"an integer from 1 to {MOST[key]}")
    return value


def number(
    config: Mapping[str, Any], key: str, default: float | None = None, *, most: float = 1e18, within: str = ""
) -> float:
    """A positive finite number out of a Hugging Face config, or the table `within` it. Raises ConfigInvalid naming the
    key where it is none."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:  # NaN isn't either
        raise _wrong(f"{within}.{key}" if within else key, value, f"a positive number of at most {most:g}")
    return float(value)


def switch(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """Raises ConfigInvalid naming the key where it is neither true nor false."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false")
    return value


def table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object inside the config; empty where it is missing. Raises ConfigInvalid where it is something else."""
    value = config.get(key)
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise _wrong(key, value, "an object")
    return value


def rope_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings as one: ``rope_theta`` and ``rope_scaling``, and ``rope_parameters`` of transformers 5."""
    return {**table(config, "rope_scaling"), **table(config, "rope_parameters")}


def _wrong(key: str, value: Any, wanted: str) -> ConfigInvalid:
    state = "missing" if value is None else show(value)
    return ConfigInvalid([Problem("model_dir", f"{key} is {state}, {wanted} is needed")])
