"""Which of GGML's block types a scheme holds without loss, and what follows for the weights of a file. No torch.

Those that have a minimum of their own beside the scale (Q4_1, Q5_1, Q2_K, Q4_K, Q5_K) fit none: ``scale * value +
minimum`` is ``scale * (value - zero)`` for an integer zero in few blocks alone, in 0.3 % of those of the demo model.
Formats: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from lightllmd.architecture.schemes import DENSE, Scheme
from lightllmd.architecture.weight_schemes import SchemeRule, WeightSchemes
from lightllmd.architecture.weights import Role, WeightSpec
from lightllmd.weights.gguf_header import GGML_TYPES
from lightllmd.weights.headers import TensorInfo

_BYTES_OF_32 = Scheme("w8a16", values="int8", scales="float16", group=32)
BLOCK_SCHEMES: dict[str, Scheme] = {
    "Q4_0": Scheme("w4a16", values="uint4", scales="float16", group=32, symmetric=False),  # its zero is always 8
    "Q5_0": _BYTES_OF_32,
    "Q8_0": _BYTES_OF_32,
    # A block's fp16 scale times the 8 bits of a group has 19 bits, which fp32 holds.
    "Q6_K": Scheme("w8a16", values="int8", scales="float32", group=16),
}
_PLAIN = frozenset(name for name, elements, _ in GGML_TYPES.values() if elements == 1)
_SHOWN_LAYERS = 4  # in a message


def stored_scheme(weight: WeightSpec, tensors: Mapping[str, TensorInfo]) -> Scheme:
    """As a file has it; DENSE where no scheme holds it."""
    kinds = {tensors[part.name].type for part in weight.parts}
    return BLOCK_SCHEMES.get(kinds.pop(), DENSE) if weight.quantisable and len(kinds) == 1 else DENSE


def stored_schemes(weights: Sequence[WeightSpec], tensors: Mapping[str, TensorInfo]) -> WeightSchemes:
    """Of all weights, as a file has them."""
    layers: dict[tuple[Role, Scheme], list[int]] = defaultdict(list)
    for weight in weights:
        scheme = stored_scheme(weight, tensors)
        if not scheme.dense and weight.layer is not None:
            layers[weight.role, scheme].append(weight.layer)
    return WeightSchemes(
        tuple(SchemeRule(scheme, roles=(role,), layers=tuple(found)) for (role, scheme), found in layers.items())
    )


def made_dense(weights: Iterable[WeightSpec], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Quantised weights that no scheme holds, in words, and why."""
    layers: dict[tuple[str, str, Role], list[int]] = defaultdict(list)
    for weight in weights:
        kinds = sorted({tensors[part.name].type for part in weight.parts})
        if not weight.quantisable or not set(kinds) - _PLAIN or not stored_scheme(weight, tensors).dense:
            continue
        why = "no scheme holds it without loss" if len(kinds) == 1 else "parts of a matrix are stored differently"
        layers[" and ".join(kinds), why, weight.role].append(weight.layer or 0)
    roles: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for (kinds_of, why, role), numbers in layers.items():
        roles[kinds_of, why, _layers(numbers)].append(role)
    return [
        f"{', '.join(found)} in {kinds} ({where}): made dense, {why}" for (kinds, why, where), found in roles.items()
    ]


def _layers(numbers: Sequence[int]) -> str:
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"layers {numbers[0]} to {numbers[-1]}"
    shown = ", ".join(map(str, numbers[:_SHOWN_LAYERS]))
    more = f" and {len(numbers) - _SHOWN_LAYERS} more" if len(numbers) > _SHOWN_LAYERS else ""
    return f"layer{'s' if len(numbers) > 1 else ''} {shown}{more}"
