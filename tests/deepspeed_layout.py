"""Writes a checkpoint as Megatron-DeepSpeed's pipeline module does: one file for each module and rank, which the stage
writes that runs the module."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiny_models import BASE, tensors_of

ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # split along their outputs
COLUMNS = ("o_proj.weight", "down_proj.weight")  # split along their inputs


def file_of(number: int, rank: int, ranks: int | None = 2) -> str:
    """`ranks` None: without model parallelism the name has no rank."""
    return f"layer_{number:02d}-model_{rank:02d}-model_states.pt" if ranks else f"layer_{number:02d}-model_states.pt"


def modules_of(tensors: dict[str, Tensor], layers: int) -> dict[int, dict[str, Tensor]]:
    """By their numbers: embedding 1, decoder 3 to layers + 2, norm layers + 4, head layers + 5."""
    modules = {1: {"weight": tensors["model.embed_tokens.weight"]}}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        modules[layer + 3] = {
            name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
        }
    modules[layers + 4] = {"weight": tensors["model.norm.weight"]}
    if "lm_head.weight" in tensors:
        modules[layers + 5] = {"lm_head.weight": tensors["lm_head.weight"]}
    return modules


def shard(name: str, tensor: Tensor, rank: int, ranks: int, *, split_vocabulary: bool = False) -> Tensor:
    """What a rank saves of a tensor: a copy of its part, as DeepSpeed's clones are."""
    if any(f".{row}." in name for row in ROWS) or (split_vocabulary and tensor.dim() == 2 and "." not in name[:-7]):
        return tensor.chunk(ranks, 0)[rank].clone()
    if name.endswith(COLUMNS):
        return tensor.chunk(ranks, 1)[rank].clone()
    return tensor.clone()


def write_deepspeed(
    folder: Path,
    changes: dict[str, Any] | None = None,
    *,
    ranks: int | None = 2,
    stages: int = 1,
    dtype: torch.dtype = torch.float32,
    split_vocabulary: bool = False,
    seed: int = 0,
) -> Path:
    """The model that `tiny_models.write_model` writes with the same `changes` and `seed`, rounded to `dtype`."""
    config = {key: value for key, value in {**BASE, **(changes or {})}.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(config, seed).items()}
    modules = modules_of(tensors, config["num_hidden_layers"])
    numbers, split = max(modules) + 1, split_vocabulary
    for stage in range(stages):
        own = range(numbers * stage // stages, numbers * (stage + 1) // stages)
        part = {number: modules[number] for number in own if number in modules}
        write_modules(folder, part, ranks, split_vocabulary=split)
    return folder


def write_modules(
    folder: Path, modules: dict[int, dict[str, Tensor]], ranks: int | None, *, split_vocabulary: bool = False
) -> None:
    """`modules`: whole tensors, which the ranks share out."""
    count = ranks or 1
    for number, state in modules.items():
        for rank in range(count):
            split = split_vocabulary and len(state) == 1
            parts = {name: shard(name, one, rank, count, split_vocabulary=split) for name, one in state.items()}
            torch.save(OrderedDict(parts), folder / file_of(number, rank, ranks))
