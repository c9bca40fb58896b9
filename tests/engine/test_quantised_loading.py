"""Weights are quantised while they are loaded, one by one, and what comes broken is named."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightllmd.architecture.families import architecture_of
from lightllmd.architecture.schemes import SCHEMES, scheme_of
from lightllmd.architecture.storage import weight_bytes
from lightllmd.architecture.weight_schemes import SchemeRule, WeightSchemes
from lightllmd.errors import WeightsInvalid
from peak_memory import W8A16
from tiny_models import BASE, load, write_model, write_tensors


def write_zeros(folder: Path, config: dict[str, object]) -> Path:
    """A checkpoint with holes in the file, so that it takes no room."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for weight in architecture_of("llama", config).weights:
        for part in weight.stored:
            begin, end = end, end + 4 * torch.Size(part.shape).numel()
            header[part.name] = {"dtype": "F32", "shape": part.shape, "data_offsets": [begin, end]}
    written = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(written)) + written)
        file.truncate(8 + len(written) + end)
    return folder


def test_loading_takes_the_quantised_model_and_one_layer_at_most(tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 3072, "num_attention_heads": 8, "num_hidden_layers": 12}
    config = {**BASE, **shape}
    weights = architecture_of("llama", config).weights
    layer = sum(4 * weight.elements for weight in weights if weight.layer == 0)
    dense, planned = weight_bytes(weights, 4), weight_bytes(weights, 4, W8A16)
    folders = [write_model(tmp_path / "small"), write_zeros(tmp_path / "large", config)]
    bound = planned + layer + (8 << 20)
    for _ in range(3):  # what else the kernel has resident for the process, pages of the file among it, only adds to it
        most, held = map(int, run(*folders).split())
        if most < bound:
            break
    assert most < bound < dense / 2
    assert held == pytest.approx(planned, rel=0.02)


def run(*folders: Path) -> str:
    """`peak_memory` in a process of its own."""
    command = [sys.executable, "-m", "peak_memory", *map(str, folders)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if not scheme.dense])
def test_a_weight_that_is_no_number_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][5, 7] = float("nan")
    write_tensors(folder, tensors)
    with pytest.raises(WeightsInvalid, match=r"the scales of weight 1\.down are no numbers"):
        load(folder, schemes=WeightSchemes.all(scheme_of(name, 32)))
    load(folder, schemes=WeightSchemes((SchemeRule(scheme_of(name, 32), roles=("qkv",)),)))  # as it is served dense
