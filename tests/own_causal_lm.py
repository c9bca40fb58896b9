"""A checkpoint whose own code is its model: learned positions, norms, attention that goes through transformers'
interface or, as another variant has it, does not. It hands none of its words on to its layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

CONFIGURATION = """\
from transformers import PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, **rest):
        self.hidden_size, self.num_hidden_layers, self.vocab_size = hidden_size, num_hidden_layers, vocab_size
        self.num_attention_heads, self.max_position_embeddings = num_attention_heads, 128
        super().__init__(**rest)
"""
MODELING = """\
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_own import OwnConfig


def eager(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **rest):
    scores = query @ key.transpose(2, 3) * scaling
    length = query.shape[2]
    scores = scores.masked_fill(torch.ones(length, length, device=scores.device).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


class OwnLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.config, self.heads, self.is_causal = config, config.num_attention_heads, True
        self.norm, self.qkv, self.out = nn.LayerNorm(size), nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x):
        parts = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        name = INTERFACE
        attend = ALL_ATTENTION_FUNCTIONS[name] if name != "eager" else eager
        return x + self.out(attend(self, q, k, v, None, scaling=q.shape[-1] ** -0.5)[0].flatten(2))


class OwnPreTrainedModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"
    _supports_attention_backend = True

    def _init_weights(self, module):
        pass


class OwnModel(OwnPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([OwnLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.tokens(input_ids) + self.positions(position_ids)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutputWithPast(last_hidden_state=x)


class OwnForCausalLM(OwnPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
        hidden = self.model(input_ids, attention_mask, position_ids).last_hidden_state
        return CausalLMOutputWithPast(logits=2.0 * torch.tanh(self.lm_head(hidden) / 2.0))
"""


def write_own_model(folder: Path, *, interface: bool = True, sink: bool = False, **config: Any) -> Path:
    """`interface`: attention goes through transformers' attention interface. `sink`: to a key before the first, too."""
    from safetensors.torch import save_file

    from model_folders import TOKENIZER

    folder.mkdir()
    said = {"architectures": ["OwnForCausalLM"], "model_type": "own", "eos_token_id": 2, "dtype": "float32"}
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(said | {"auto_map": own} | config))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    name = "self.config._attn_implementation" if interface else '"eager"'
    keys = "torch.cat([k[:, :, :1] * 0, k], 2), torch.cat([v[:, :, :1] * 0, v], 2)" if sink else "k, v"
    modeling = MODELING.replace("INTERFACE", name).replace("(self, q, k, v, None", f"(self, q, {keys}, None")
    (folder / "modeling_own.py").write_text(modeling)
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.tokens.weight": (96, 32),
        "model.positions.weight": (128, 32),
        "lm_head.weight": (96, 32),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}norm.weight": (32,), f"{prefix}norm.bias": (32,), f"{prefix}qkv.weight": (96, 32)}
        shapes |= {f"{prefix}qkv.bias": (96,), f"{prefix}out.weight": (32, 32), f"{prefix}out.bias": (32,)}
    tensors = {name: torch.randn(shape, generator=generator) * 1.5 / shape[-1] ** 0.5 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
