"""Writes a checkpoint of random weights beside a config.json, for timings of loading that need files; the tokenizer's
words are the ids in decimal.

``python tests/bench/write_model.py CONFIG_DIR OUT_DIR``: OUT_DIR gets config.json and safetensors shards of at most
4 GB in the config's dtype. An 8B model takes 16 GB of disk, and as much of the page cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from lightllmd.architecture.families import architecture_of

SHARD = 4_000_000_000  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    config = json.loads((arguments.source / "config.json").read_bytes())
    dtype = getattr(torch, config["torch_dtype"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = architecture_of(config["model_type"], config).weights
    parts = [part for weight in weights for part in weight.stored]
    arguments.out.mkdir(parents=True, exist_ok=True)
    begun, shards, held, weight_map = time.monotonic(), 0, {}, {}

    def write() -> None:
        nonlocal shards, held
        file = f"model-{shards + 1:05}.safetensors"
        save_file(held, arguments.out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
        shards, held = shards + 1, {}

    for part in parts:
        mean, spread = (1.0, 0.05) if part.name.endswith("norm.weight") else (0.0, 0.02)
        tensor = torch.empty(part.shape, dtype=dtype, device=device).normal_(mean, spread).cpu()
        if sum(other.nbytes for other in held.values()) + tensor.nbytes > SHARD and held:
            write()
        held[part.name] = tensor
    write()
    words = models.WordLevel({str(token): token for token in range(config["vocab_size"])}, unk_token="0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    index = {"metadata": {}, "weight_map": weight_map}
    (arguments.out / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(arguments.source / "config.json", arguments.out / "config.json")
    size = sum(file.stat().st_size for file in arguments.out.iterdir())
    print(f"{size / 1e9:.1f} GB in {shards} files, {time.monotonic() - begun:.1f} s")


if __name__ == "__main__":
    main()
