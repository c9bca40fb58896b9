"""FP8 checkpoints: ``quant_method = "fp8"`` as DeepSeek, Qwen and transformers write it (blocks, ``weight_scale_inv``)
or AutoFP8 and vLLM (a scale for each tensor, ``weight_scale`` and perhaps ``input_scale``), and NVIDIA ModelOpt's FP8
(``quant_method = "modelopt"``, or a folder with a hf_quant_config.json)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from lightllmd.errors import show
from lightllmd.weights.quantised.elementwise import ElementwiseForm, float8
from lightllmd.weights.quantised.form import CheckpointQuantisation, Form
from lightllmd.weights.quantised.settings import listed, names, refused, table, word

CACHE_SCALES = r".*\.(k_scale|v_scale|q_scale|prob_scale|k_proj\.output_scale|v_proj\.output_scale|kv_scale)"
CACHE_NOTE = "scales of keys and values that the checkpoint brings are not used"


def read(settings: Mapping[str, Any]) -> CheckpointQuantisation:
    """Of ``quant_method = "fp8"``. Raises ConfigInvalid."""
    kind = word(settings, "fmt", default="e4m3")
    if kind not in ("e4m3", "float8_e4m3fn"):
        raise refused(f"FP8 checkpoints of format {show(kind)} are not available; of e4m3 are")
    if word(settings, "expert_dtype", default="fp8") != "fp8":
        raise refused('quantization_config.expert_dtype: experts of other bits than "fp8" are not available')
    static = _static(settings)
    block = settings.get("weight_block_size")
    if block is None:
        scheme, words = float8(static=static), "by tensor or row"
    else:
        rows, group = block_of(block, "weight_block_size")
        if static:
            raise refused("quantization_config.activation_scheme = static with weight_block_size is not available")
        scheme, words = float8(group, rows), f"blocks of {rows} x {group}"
    form = ElementwiseForm(
        scheme, ("weight_scale_inv", "weight_scale") if block else ("weight_scale", "weight_scale_inv")
    )
    kept = names(settings, "modules_to_not_convert", "ignored_layers")
    converted = names(settings, "modules_to_convert")
    inputs = "static" if static else "dynamic"
    return CheckpointQuantisation(
        f"FP8, {words}, {inputs} inputs", _forms(form, kept, converted), CACHE_SCALES, (CACHE_NOTE,)
    )


def _static(settings: Mapping[str, Any]) -> bool:
    scheme = word(settings, "activation_scheme", default="dynamic")
    if scheme not in ("dynamic", "static"):
        raise refused(f"quantization_config.activation_scheme is {show(scheme)}, dynamic or static is needed")
    return scheme == "static"


def block_of(value: Any, key: str) -> tuple[int, int]:
    """(outputs, inputs). Raises ConfigInvalid."""
    sizes = value if isinstance(value, list) and len(value) == 2 else [0]
    if not all(isinstance(size, int) and not isinstance(size, bool) and 0 < size <= 1 << 16 for size in sizes):
        raise refused(f"quantization_config.{key} is {show(value)}, two sizes are needed")
    return sizes[0], sizes[1]


def _forms(form: Form, kept: list[str], converted: list[str]) -> Callable[[str, bool], Form | None]:
    def form_of(module: str, embedding: bool) -> Form | None:
        outside = embedding or ".layers." not in f".{module}"
        return None if (outside and not listed(module, converted)) or listed(module, kept) else form

    return form_of


def read_modelopt(settings: Mapping[str, Any]) -> CheckpointQuantisation:
    """Raises ConfigInvalid."""
    inner = table(settings, "quantization") or settings  # hf_quant_config.json has one table more
    kind = word(inner, "quant_algo", default="none")
    if kind != "fp8":
        raise refused(f"ModelOpt checkpoints of quant_algo {show(kind)} are not available; of FP8 are")
    kept = names(inner, "exclude_modules", "ignore")
    form = ElementwiseForm(float8(static=True))

    def form_of(module: str, embedding: bool) -> Form | None:
        outside = embedding or ".layers." not in f".{module}"
        return None if outside or any(fnmatchcase(module, one) for one in kept) or listed(module, kept) else form

    words = "ModelOpt's FP8, by tensor, static inputs"
    return CheckpointQuantisation(words, form_of, CACHE_SCALES, (CACHE_NOTE,))
