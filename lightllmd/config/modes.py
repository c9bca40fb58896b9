"""The names that the documented `mode` parameter takes, and what each means: one table.

A mode says how the KV cache is stored and read, or how weights are stored. `triton_gqa_*` on a model without grouped
queries runs with groups of one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lightllmd.architecture.kv_schemes import KvSchemeName
from lightllmd.architecture.schemes import SCHEMES
from lightllmd.architecture.weights import Role

Kind = Literal["attention", "kv", "weights"]
KINDS: dict[Kind, str] = {"attention": "decode attention of a GPU", "kv": "KV cache", "weights": "weights"}


@dataclass(frozen=True)
class Mode:
    """What a name stands for."""

    does: str  # in words, behind the name
    kind: Kind
    kernel: str = "auto"  # the decode attention of a GPU, see `kernels.fused_attention`
    kv: KvSchemeName = "dense"  # how the KV cache is stored
    scheme: str = "dense"  # of the weights that may be quantised, a key of SCHEMES
    kept: tuple[Role, ...] = ()  # of those, what stays dense
    mixdown: bool = False  # down stays dense in some layers
    data_type: str = ""  # the only one that it computes in on a GPU
    of_a_gpu: bool = False  # its name means a kernel of a GPU, and a CPU has its own for the same

    @property
    def has_groups(self) -> bool:
        """gN says how many neighbouring inputs share a scale."""
        return SCHEMES[self.scheme].values == "uint4"


def _attention(does: str, kernel: str = "auto", data_type: str = "") -> Mode:
    return Mode(does, "attention", kernel, data_type=data_type, of_a_gpu=True)


def _kv(does: str, kv: KvSchemeName) -> Mode:
    return Mode(does, "kv", kv=kv)


def _weights(does: str, scheme: str, kept: tuple[Role, ...] = (), data_type: str = "", mixdown: bool = False) -> Mode:
    return Mode(does, "weights", scheme=scheme, kept=kept, data_type=data_type, mixdown=mixdown)


_FP16 = "as triton_gqa_flashdecoding, in float16"
_INT8_KV = "int8 KV cache, a scale for each token and head"
_GROUPED_KV = "int8 KV cache, a scale for 8 values of a head"
_GROUPED_INT4_KV = "4-bit KV cache, a scale for 8 values of a head"
_W4A16 = "4-bit weights, a scale and a zero for each 128 inputs of a row, or for N with gN"
_OUT: tuple[Role, ...] = ("attention_out",)
_W8A8 = "int8 weights, a scale for each row, times inputs in int8, a scale for each token"

MODES: dict[str, Mode] = {
    "triton_flashdecoding": _attention("rows cut into segments, each query head by itself", "triton_flashdecoding"),
    "triton_gqa_attention": _attention(
        "query heads that share keys and values together, rows not cut", "triton_gqa_attention"
    ),
    "triton_gqa_flashdecoding": _attention("rows cut, heads together", "triton_gqa_flashdecoding"),
    "ppl_fp16": _attention(_FP16, "ppl_fp16", "float16"),
    "ppl_fp16_flashdecoding": _attention(_FP16, "ppl_fp16", "float16"),
    "triton_int8kv": _kv(_INT8_KV, "int8"),
    "ppl_int8kv": _kv(_GROUPED_KV, "int8_group8"),
    "ppl_int8kv_flashdecoding": _kv(_GROUPED_KV, "int8_group8"),
    "ppl_int4kv_flashdecoding": _kv(_GROUPED_INT4_KV, "int4_group8"),
    "int4kv": _kv("4-bit KV cache, a scale and a least value for 16 values of a head", "int4"),
    "fp8kv": _kv("float8 (e4m3) KV cache, a scale for each token and head", "fp8"),
    "triton_w4a16": _weights(_W4A16, "w4a16"),
    "lmdeploy_w4a16": _weights(_W4A16, "w4a16"),
    "ppl_w4a16": _weights(_W4A16, "w4a16"),
    "triton_w8a16": _weights("int8 weights, a scale for each row", "w8a16"),
    "triton_w8a8": _weights(_W8A8, "w8a8", data_type="float16"),
    "ppl_w8a8": _weights("as triton_w8a8 in any data_type, attention's output matrix left as it is", "w8a8", _OUT),
    "ppl_w8a8_mixdown": _weights(
        "as ppl_w8a8, the down matrices of the layers that quantise.mixdown names left as they are, too",
        "w8a8",
        _OUT,
        mixdown=True,
    ),
    "fp8": _weights("float8 (e4m3) weights, a scale for each row, times float8 inputs, a scale for each token", "fp8"),
    "fp8_block": _weights(
        "float8 (e4m3) weights, a scale for 128 x 128 of them, times float8 inputs, a scale for 128 of a token",
        "fp8_block",
    ),
}

ALIASES = {
    "triton_int8weight": "triton_w8a16",
    "triton_int4weight": "triton_w4a16",
    "lmdeploy_int4weight": "lmdeploy_w4a16",
    "ppl_int4weight": "ppl_w4a16",
}

# What LightLLM accepts beside these, and why it is not built.
REFUSED = {
    "flash_llm_w6a16": "6-bit floating point weights have no kernels here; the nearest is triton_w8a16 (8 bits), or "
    "triton_w4a16 (4 bits)",
    "quik_activation_weight": "4-bit inputs beside outliers that a calibration finds have no kernels here; the nearest "
    "is triton_w8a8 (8-bit weights and inputs), or triton_w4a16 (4-bit weights)",
}

NAMES = (*MODES, *ALIASES, *REFUSED)
GROUPS = (16, 32, 64, 128, 256, 512, 1024)  # what gN may say: inputs that share a scale
GROUP = re.compile(r"g(\d+)")


def canonical(name: str) -> str:
    """What an alias stands for; any other name."""
    return ALIASES.get(name, name)


def of_kind(names: Iterable[str], *kinds: Kind) -> list[str]:
    """Those of `names` that are modes of these kinds, each once, aliases resolved."""
    found = dict.fromkeys(map(canonical, names))
    return [name for name in found if name in MODES and MODES[name].kind in kinds]


def groups(names: Iterable[str]) -> list[int]:
    """What gN among `names` say, each once."""
    return list(dict.fromkeys(int(match[1]) for name in names if (match := GROUP.fullmatch(name))))


def group_fault() -> str:
    """What groups of 4-bit weights there are, in words."""
    return f"a group of 4-bit weights has {', '.join(map(str, GROUPS[:-1]))} or {GROUPS[-1]} inputs"


def alike() -> dict[str, list[str]]:
    """What modes do, and the names of those that do it."""
    found: dict[str, list[str]] = {}
    for name, mode in MODES.items():
        found.setdefault(mode.does, []).append(name)
    return found


IN_WORDS = "; ".join(f"{', '.join(names)}: {does}" for does, names in alike().items())
