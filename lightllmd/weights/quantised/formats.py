"""Which formats of quantised checkpoints there are, and how a folder says which one it has. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightllmd.errors import ConfigInvalid, Problem, show
from lightllmd.weights.model_files import MAX_CONFIG, present, read_json
from lightllmd.weights.quantised import awq, compressed_tensors, float8, gptq
from lightllmd.weights.quantised.form import CheckpointQuantisation
from lightllmd.weights.quantised.settings import refused

READ: dict[str, Callable[[Mapping[str, Any]], CheckpointQuantisation]] = {
    "awq": awq.read,
    "gptq": gptq.read,
    "compressed-tensors": compressed_tensors.read,
    "fp8": float8.read,
    "modelopt": float8.read_modelopt,
}
# Settings in a file of their own, as older tools write them, and the format that a file is of.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
AVAILABLE = (
    "AWQ (gemm), GPTQ (4 and 8 bits), compressed-tensors (pack-, int- and float-quantized), FP8 and ModelOpt's FP8 are"
)


def settings_of(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """What a model folder says, and the file that does: config.json's quantization_config, or all of another one;
    empty where its matrices are dense. Raises ConfigInvalid."""
    for key in ("quantization_config", "compression_config"):
        if found := config.get(key):
            if not isinstance(found, dict):
                raise refused(f"{path / 'config.json'}: {key} is {show(found)}, an object is needed")
            return found, path / "config.json"
    for name, method in FILES.items():
        if present(path / name):
            return {"quant_method": method, **read_json(path / name, MAX_CONFIG)}, path / name
    return {}, path


def quantisation_of(settings: Mapping[str, Any], where: Path | str = "") -> CheckpointQuantisation:
    """What they mean; `where`: who says so. Raises ConfigInvalid naming what is not available, and what is."""
    method = settings.get("quant_method")
    method = method.lower() if isinstance(method, str) else method
    if method is None and any(key.startswith(("load_in_", "bnb_")) for key in settings):
        method = "bitsandbytes"
    if method is None and "config_groups" in settings:
        method = "compressed-tensors"
    prefix = f"{where}: " if where else ""
    if method not in READ:
        named = "that name no quant_method" if method is None else f"of quant_method {show(method)}"
        raise refused(f"{prefix}quantised checkpoints {named} are not available; {AVAILABLE}")
    try:
        return READ[method](settings)
    except ConfigInvalid as fault:
        raise ConfigInvalid([Problem(one.key, f"{prefix}{one.message}") for one in fault.problems]) from None
