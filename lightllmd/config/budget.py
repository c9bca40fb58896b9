"""Memory, planned before anything is loaded: what the weights, the worst step and each KV slot take. Pure arithmetic.

All sizes in bytes, for one device. The engine measures what it really took; this is the only place that decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightllmd.config.parameters import Config
from lightllmd.config.plan import Budget, BudgetRow, DeviceFacts, ModelFacts
from lightllmd.errors import ConfigInvalid, Problem

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

# The engine obeys these bounds on its workspace, so that what is planned here is what it takes.
# Rows whose fp32 logits exist at a time, however many rows a step has, and for each logit the copies that ranking
# makes (probabilities, sorted values and ids, running sums in fp64).
LOGIT_ROWS = 64
BYTES_PER_LOGIT = 64
# Decode rows are read together, padded to at most this many times what they hold; rows of up to SHORT_ROW tokens are
# never parted, whatever that pads.
GATHER_PADDING = 2
SHORT_ROW = 128
SPARE_WIDTH = 8  # entries of the request table beyond the longest request
RUNTIME = 600_000_000  # interpreter, torch and its thread pools, or a CUDA context
MARGIN_SHARE, MARGIN_LEAST = 0.02, 256_000_000
# A CPU decodes a few sequences at a time; more KV cache than this would only take memory from other programs.
CPU_KV_CAP = 2_000_000_000


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


@dataclass(frozen=True)
class Demand:
    """Everything but the number of slots is settled; says what is left for them."""

    rows: list[BudgetRow]  # all that does not depend on the number of slots
    available: int
    slot_bytes: int  # keys and values of one token in all layers
    gather_bytes: int  # per slot: one layer's keys and values, gathered for attention

    @property
    def room(self) -> int:
        """Left for slots; negative when even the rest does not fit."""
        return self.available - sum(row.bytes for row in self.rows)

    @property
    def most_slots(self) -> int:
        return max(0, self.room // (self.slot_bytes + self.gather_bytes))

    def with_slots(self, slots: int) -> Budget:
        kv = BudgetRow("kv cache", slots * self.slot_bytes, f"{slots} slots x {size(self.slot_bytes)}")
        gather = BudgetRow(
            "attention", slots * self.gather_bytes, f"one layer's keys and values gathered, padded x {GATHER_PADDING}"
        )
        weights, *rest = self.rows
        return Budget(rows=[weights, kv, gather, *rest], available=self.available)


def demand(config: Config, model: ModelFacts, device: DeviceFacts, data_type: str, batch_max_tokens: int) -> Demand:
    """What this model takes on this device under this configuration, slots apart. Raises ConfigInvalid."""
    shape, item = Shape.of(model.model_type, model.hf_config), ITEM_BYTES[data_type]
    available = int(device.memory_free * config.engine.memory_fraction)
    layer_bytes = 2 * shape.kv_heads * shape.head_dim * item  # keys and values of one token in one layer
    rows = [
        _weights(shape, model, device, data_type),
        _activations(shape, batch_max_tokens, item),
        _logits(shape, item),
        _tables(config, device),
        _short_rows(config, layer_bytes),
        BudgetRow("graphs", 0, "none on a CPU" if device.kind == "cpu" else "none: steps run eagerly"),
        BudgetRow("runtime", RUNTIME, "the process before it has loaded anything"),
        BudgetRow("margin", max(MARGIN_LEAST, int(available * MARGIN_SHARE)), f"{MARGIN_SHARE:.0%}, at least 256 MB"),
    ]
    return Demand(rows, available, shape.layers * layer_bytes, GATHER_PADDING * layer_bytes)


def _weights(shape: Shape, model: ModelFacts, device: DeviceFacts, data_type: str) -> BudgetRow:
    item = ITEM_BYTES[data_type]
    elements, how = model.weight_elements, f"{count(model.weight_elements)} parameters in {data_type}"
    if shape.tied and device.kind == "cpu" and data_type != "float16":
        elements += shape.vocab * shape.hidden
        how += ", the tied embedding once more as packed head"
    return BudgetRow("weights", elements * item, how)


def _short_rows(config: Config, layer_bytes: int) -> BudgetRow:
    """A full batch of short rows, one of them SHORT_ROW long, is padded far beyond the slots that it holds."""
    rows = config.params.running_max_req_size
    how = f"{rows} rows x {SHORT_ROW} tokens x {size(layer_bytes)}, gathered together"
    return BudgetRow("short rows", rows * SHORT_ROW * layer_bytes, how)


def _activations(shape: Shape, tokens: int, item: int) -> BudgetRow:
    """The largest prefill step: residual and norm, then either attention or the MLP's two halves and their product."""
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    rotated = (shape.heads + shape.kv_heads) * shape.head_dim
    attention = heads + rotated + 2 * shape.heads * shape.head_dim
    per_token = (2 * shape.hidden + max(attention, 3 * shape.intermediate) + 2 * shape.head_dim) * item
    return BudgetRow("activations", tokens * per_token, f"prefill of {tokens} tokens x {size(per_token)}")


def _logits(shape: Shape, item: int) -> BudgetRow:
    return BudgetRow(
        "logits",
        LOGIT_ROWS * shape.vocab * (BYTES_PER_LOGIT + item),
        f"{LOGIT_ROWS} rows at a time x {shape.vocab} x {BYTES_PER_LOGIT + item} B, sorted",
    )


def _tables(config: Config, device: DeviceFacts) -> BudgetRow:
    """request->slot table and penalty history, 32 bits an entry; they live in host memory."""
    if device.kind != "cpu":
        return BudgetRow("tables", 0, "request table and history live in host memory")
    rows, width = config.params.running_max_req_size + 1, config.params.max_req_total_len + SPARE_WIDTH
    return BudgetRow("tables", 2 * rows * width * 4, f"request table and history, each {rows} x {width} x 4 B")


def size(amount: float) -> str:
    """Bytes in decimal units with three significant digits: 1.49 GB, 98.4 MB."""
    sign, amount = ("-" if amount < 0 else ""), abs(amount)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 999.5 or unit == "TB":
            break
        amount /= 1000
    digits = 0 if unit == "B" or amount >= 99.95 else 1 if amount >= 9.995 else 2
    return f"{sign}{amount:.{digits}f} {unit}"


def count(amount: int) -> str:
    """134.5 M"""
    return f"{amount / 1e9:.2f} G" if amount >= 1e9 else f"{amount / 1e6:.1f} M"
