"""A model's facts, read from its JSON files and headers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec

from lightllmd.config.plan import ModelFacts
from lightllmd.config.shape import Shape
from lightllmd.errors import ConfigInvalid, Problem, WeightsInvalid
from lightllmd.weights.headers import (
    END_OF_TURN,
    TensorInfo,
    gguf_dtype,
    gguf_eos_ids,
    gguf_hf_config,
    locate_model,
    read_gguf_header,
    read_safetensors_headers,
)

DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
# Rotations whose config.json says the context before stretching.
_STRETCHING = ("linear", "dynamic")


def model_facts(model_dir: str, *, dummy: bool = False) -> ModelFacts:
    """`dummy`: weights will be invented, so that no weight file is needed or read.

    Raises ConfigInvalid when there is no model to be found, WeightsInvalid when its files are damaged.
    """
    path = locate_model(model_dir)
    try:
        facts = _of_gguf(path) if path.is_file() else _of_directory(path, dummy)
        return _dummy(facts) if dummy else facts
    except OSError as error:
        raise ConfigInvalid(
            [Problem("model_dir", f"{error.filename or path} can't be read: {error.strerror}")]
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON of another form than the format's
        raise WeightsInvalid(f"{path}: its files are not as their format says: {error!r}") from error


def _dummy(facts: ModelFacts) -> ModelFacts:
    try:
        elements = Shape.of(facts.model_type, facts.hf_config).weight_elements
    except ConfigInvalid:
        elements = 0  # resolution tells it, unless the model's type is reason enough to refuse it
    return msgspec.structs.replace(facts, format="dummy", files=[], weight_elements=elements, weight_bytes=0)


# --- GGUF -------------------------------------------------------------------------------------------------------


def _of_gguf(path: Path) -> ModelFacts:
    header = read_gguf_header(path)
    config = gguf_hf_config(header)
    stored = [tensor for tensor in header.tensors if tensor.name != "rope_freqs.weight"]
    return ModelFacts(
        path=str(path),
        format="gguf",
        model_type=str(config["model_type"]),
        hf_config=config,
        files=[str(path)],
        weight_elements=sum(tensor.elements for tensor in stored),
        weight_bytes=sum(tensor.nbytes for tensor in stored),
        checkpoint_dtype=gguf_dtype(header),
        context_length=_context_length(config),
        eos_ids=gguf_eos_ids(header),
        has_tokenizer="tokenizer.ggml.tokens" in header.metadata,
        has_chat_template="tokenizer.chat_template" in header.metadata,
    )


# --- Hugging Face directory ---------------------------------------------------------------------------------------


def _of_directory(path: Path, dummy: bool) -> ModelFacts:
    config = _json(path / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise WeightsInvalid(f"{path / 'config.json'}: model_type is missing")
    headers = [] if dummy else read_safetensors_headers(path)
    if not headers and not dummy:
        raise ConfigInvalid([Problem("model_dir", _no_weights(path))])
    tensors = [tensor for header in headers for tensor in header.tensors if _is_weight(tensor, config)]
    tokenizer = _json(path / "tokenizer_config.json", optional=True)
    template = _chat_template(path, tokenizer)
    has_tokenizer = _has_tokenizer(path)
    return ModelFacts(
        path=str(path),
        format="safetensors",
        model_type=model_type,
        hf_config=config,
        files=[str(header.path) for header in headers],
        weight_elements=sum(tensor.elements for tensor in tensors),
        weight_bytes=sum(tensor.nbytes for tensor in tensors),
        checkpoint_dtype=_dtype(config, tensors),
        context_length=_context_length(config),
        eos_ids=_eos_ids(path, config, tokenizer, template),
        has_tokenizer=has_tokenizer,
        has_chat_template=has_tokenizer and bool(template),
    )


def _has_tokenizer(path: Path) -> bool:
    found = {name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (path / name).is_file()}
    return "tokenizer.json" in found or len(found) == 2 or any(path.glob("*.model"))


def _no_weights(path: Path) -> str:
    if any(path.glob("*.bin")):
        return f"{path} has its weights in PyTorch's .bin files, which are not available yet; safetensors are"
    return f"{path} has no *.safetensors file"


def _json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise WeightsInvalid(f"{path}: no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise WeightsInvalid(f"{path}: no JSON object")
    return value


def _is_weight(tensor: TensorInfo, config: dict[str, Any]) -> bool:
    """Not a tied head that was stored a second time, and not a table that is computed anew."""
    if tensor.name == "lm_head.weight" and config.get("tie_word_embeddings"):
        return False
    return not tensor.name.endswith("rotary_emb.inv_freq")


def _dtype(config: dict[str, Any], tensors: list[TensorInfo]) -> str | None:
    """As config.json names it (`dtype` since transformers 5, `torch_dtype` before), else what most bytes are."""
    named = config.get("dtype") or config.get("torch_dtype")
    if named in DTYPES.values():
        return str(named)
    volume: dict[str, int] = {}
    for tensor in tensors:
        volume[tensor.type] = volume.get(tensor.type, 0) + tensor.nbytes
    return DTYPES.get(max(volume, key=lambda kind: volume[kind])) if volume else None


def _context_length(config: dict[str, Any]) -> int | None:
    context = config.get("max_position_embeddings")
    if not isinstance(context, int) or isinstance(context, bool):
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
    if kind in _STRETCHING and isinstance(factor, int | float):
        return int(max(context, rope.get("original_max_position_embeddings", context) * factor))
    return context


def _chat_template(path: Path, tokenizer: dict[str, Any]) -> str:
    """The template's text, all of them where a model has several; empty if there is none."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    template = _json(path / "chat_template.json", optional=True).get("chat_template") or tokenizer.get("chat_template")
    if isinstance(template, list):
        return "\n".join(str(one.get("template", "")) for one in template if isinstance(one, dict))
    return template if isinstance(template, str) else ""


def _eos_ids(path: Path, config: dict[str, Any], tokenizer: dict[str, Any], template: str) -> list[int]:
    found: list[Any] = []
    for source in (_json(path / "generation_config.json", optional=True), config):
        ids = source.get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids]
    texts = {text for text in END_OF_TURN if text in template}
    eos = tokenizer.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if isinstance(eos, str):
        texts.add(eos)
    if texts:
        found += [number for text, number in _added_tokens(path, tokenizer).items() if text in texts]
    return list(dict.fromkeys(number for number in found if isinstance(number, int) and not isinstance(number, bool)))


def _added_tokens(path: Path, tokenizer: dict[str, Any]) -> dict[str, int]:
    """Text -> id of the tokens outside the learnt vocabulary, from whichever file lists them."""
    listed = tokenizer.get("added_tokens_decoder")
    if isinstance(listed, dict) and listed:
        return {token["content"]: int(number) for number, token in listed.items() if number.isdecimal()}
    file = path / "added_tokens.json"
    if file.is_file():
        return {text: number for text, number in _json(file).items() if isinstance(number, int)}
    if os.path.exists(path / "tokenizer.json"):
        tokens = _json(path / "tokenizer.json").get("added_tokens") or []
        return {token["content"]: token["id"] for token in tokens if "content" in token and "id" in token}
    return {}
