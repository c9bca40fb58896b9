"""compressed-tensors, as llm-compressor writes it: ``quant_method = "compressed-tensors"``.

pack-quantized: ``weight_packed [N, K / 8]`` holds eight 4-bit values of a row in a word (four of 8 bits), the first in
the lowest bits, each plus half its range; ``weight_scale [N, G]``; ``weight_zero_point [N / 8, G]``, packed along N;
``weight_shape``; ``weight_g_idx [K]``. int-quantized and float-quantized: a value an element.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightllmd.architecture.schemes import SCHEMES, Scheme
from lightllmd.errors import show
from lightllmd.weights.quantised.elementwise import ElementwiseForm, float8, int8
from lightllmd.weights.quantised.float8 import CACHE_SCALES, block_of
from lightllmd.weights.quantised.form import (
    FLOATS,
    WORDS,
    CheckpointQuantisation,
    Form,
    FormTensor,
    scale_shapes,
    words_of,
)
from lightllmd.weights.quantised.settings import groups_in_words, matches, names, refused, switch, table, whole, word

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
MOST_TARGETS = 20_000


@dataclass(frozen=True)
class PackedForm(Form):
    """Of one module of pack-quantized."""

    bits: int
    group: int  # 0: all inputs
    symmetric: bool
    ordered: bool

    @property
    def scheme(self) -> Scheme:  # type: ignore[override]
        """8 bits that are symmetric need no zeros: the values are those of int8."""
        if self.bits == 4:
            return replace(SCHEMES["w4a16"], group=self.group, ordered=self.ordered)
        return replace(int8(self.group, self.symmetric, inputs=False), ordered=self.ordered)

    def fields(self, rows: int, columns: int) -> tuple[FormTensor, ...]:
        """As the module's head has them."""
        per_word, groups = 32 // self.bits, self.scheme.groups(columns)
        fields = [
            FormTensor("values", ("weight_packed",), WORDS, ((rows, words_of(columns, per_word)),)),
            FormTensor("scales", ("weight_scale",), FLOATS, scale_shapes(rows, groups, self.group > 0)),
            FormTensor("shape", ("weight_shape",), frozenset({"I32", "I64"}), ((2,),), optional=True),
            FormTensor("groups", ("weight_g_idx",), WORDS | {"I64"}, ((columns,),), optional=True),
        ]
        if not self.symmetric:
            fields.append(FormTensor("zeros", ("weight_zero_point",), WORDS, ((words_of(rows, per_word), groups),)))
        return tuple(fields)


def read(settings: Mapping[str, Any]) -> CheckpointQuantisation:
    """Raises ConfigInvalid."""
    form = word(settings, "format", default="dense")
    if form not in FORMATS:
        raise refused(f"compressed-tensors of format {show(form)} are not available; {', '.join(FORMATS)} are")
    sparsity = word(table(settings, "sparsity_config"), "format", default="dense")
    if sparsity != "dense":
        raise refused(f"compressed-tensors with sparse weights ({show(sparsity)}) are not available; dense ones are")
    if table(settings, "transform_config").get("config_groups"):
        raise refused("compressed-tensors with transform_config (rotated weights) are not available")
    targets: dict[str, Form] = {}
    words: dict[str, None] = {}
    for name, group in table(settings, "config_groups").items():
        if not isinstance(group, dict):
            raise refused(f"quantization_config.config_groups.{name} is {show(group)}, an object is needed")
        made, said = _form(name, group, word(group, "format", default=form))
        targets |= dict.fromkeys(names(group, "targets"), made)
        words[said] = None
    ignored = names(settings, "ignore")
    if not targets or len(targets) + len(ignored) > MOST_TARGETS:
        raise refused(f"quantization_config.config_groups has {len(targets)} targets, 1 to {MOST_TARGETS} are needed")
    for pattern in (*targets, *ignored):
        _matches(pattern, "")
    # The more a target says the sooner it is tried: names, patterns, and last classes, which no module's name is.
    tried = sorted(targets, key=lambda target: target.startswith("re:"))

    def form_of(module: str, embedding: bool) -> Form | None:
        kind = "Embedding" if embedding else "Linear"
        if any(one == kind or _matches(one, module) for one in ignored):
            return None
        found = next((one for one in tried if _matches(one, module)), kind)
        return targets.get(found)

    notes: tuple[str, ...] = ()
    if settings.get("kv_cache_scheme"):
        notes = ("kv_cache_scheme and its scales are not used: the KV cache is stored as mode says",)
    return CheckpointQuantisation(f"compressed-tensors, {'; '.join(words)}", form_of, CACHE_SCALES, notes)


def _matches(target: str, module: str) -> bool:
    return matches(target.removeprefix("re:"), module) if target.startswith("re:") else target == module


def _form(name: str, group: Mapping[str, Any], form: str) -> tuple[Form, str]:
    """Of one of the config_groups, and in words."""
    weights, inputs = table(group, "weights"), table(group, "input_activations")
    where = f"quantization_config.config_groups.{name}"
    if not weights:
        raise refused(f"{where} has no weights: what quantises inputs alone is not available")
    if table(group, "output_activations"):
        raise refused(f"{where}.output_activations are not available")
    if word(weights, "type", default="int") == "float":
        made, said = _float(where, weights, inputs)
    else:
        made, said = _int(where, weights, inputs, form)
    expected = "pack-quantized" if isinstance(made, PackedForm) else f"{'float' if 'FP8' in said else 'int'}-quantized"
    if form not in (expected, "naive-quantized", "mixed-precision"):
        raise refused(f"{where}: {said} in format {show(form)} are not available; in {expected} they are")
    return made, said


def _group(where: str, weights: Mapping[str, Any]) -> int:
    """Inputs that share a scale; 0: all of a row, or of the tensor."""
    strategy, size = word(weights, "strategy"), whole(weights, "group_size", default=-1)
    strategy = strategy or ("group" if size > 0 else "channel")
    if strategy in ("channel", "tensor"):
        return 0
    if strategy != "group" or size <= 0 or size % 8:
        raise refused(f"{where}.weights: strategy {show(strategy)} with group_size {size} is not available")
    return size


def _int(where: str, weights: Mapping[str, Any], inputs: Mapping[str, Any], form: str) -> tuple[Form, str]:
    bits, symmetric = whole(weights, "num_bits", default=8), switch(weights, "symmetric", True)
    group = _group(where, weights)
    order = weights.get("actorder")
    ordered = order in (True, "group", "dynamic", "GROUP", "DYNAMIC")
    scaled = groups_in_words(group)
    said = f"{bits} bits, {scaled}, {'symmetric' if symmetric else 'with zeros'}"
    if form == "pack-quantized":
        if bits not in (4, 8) or inputs:
            raise refused(
                f"{where}: packed weights of {bits} bits{_with(inputs)} are not available; of 4 and 8 bits are"
            )
        return PackedForm(bits, group, symmetric, ordered), said + (", act-order" if ordered else "")
    if bits != 8 or ordered:
        raise refused(
            f"{where}: int weights of {bits} bits{_with(inputs)} in format {show(form)} are not available; "
            "of 8 bits are"
        )
    if inputs and group:
        raise refused(f"{where}: weights in groups times rounded inputs are not available; a scale for each row is")
    static = _static(where, inputs, "int", ("token", "tensor"))
    scheme = int8(group, symmetric, inputs=bool(inputs), static=static)
    rounded = f", {'static' if static else 'dynamic'} int8 inputs" if inputs else ""
    return ElementwiseForm(scheme), said + rounded


def _float(where: str, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> tuple[Form, str]:
    bits, strategy = whole(weights, "num_bits", default=8), word(weights, "strategy", default="tensor")
    if bits != 8 or not switch(weights, "symmetric", True):
        raise refused(f"{where}: float weights of {bits} bits are not available; symmetric ones of 8 bits (FP8) are")
    if strategy == "block":
        rows, group = block_of(weights.get("block_structure"), f"config_groups.*.weights.block_structure of {where}")
        static = _static(where, inputs, "float", ("group",))
        if inputs and (static or whole(inputs, "group_size", default=group) != group):
            raise refused(f"{where}: inputs of blocks need groups of {group}, dynamic")
        scheme = float8(group, rows, inputs=bool(inputs))
        return ElementwiseForm(scheme), f"FP8, blocks of {rows} x {group}{_rounded(inputs, False)}"
    if strategy not in ("tensor", "channel"):
        raise refused(f"{where}.weights: strategy {show(strategy)} of FP8 is not available; tensor, channel, block are")
    static = _static(where, inputs, "float", ("token", "tensor"))
    scaled = "tensor" if strategy == "tensor" else "row"
    scheme = float8(inputs=bool(inputs), static=static)
    return ElementwiseForm(scheme), f"FP8 by {scaled}{_rounded(inputs, static)}"


def _static(where: str, inputs: Mapping[str, Any], kind: str, dynamic: tuple[str, ...]) -> bool:
    """Whether inputs have one scale that was found before; else one of each token, by a `dynamic` strategy."""
    if not inputs:
        return False
    bits, strategy = whole(inputs, "num_bits", default=8), word(inputs, "strategy", default="tensor")
    if bits != 8 or word(inputs, "type", default="int") != kind or not switch(inputs, "symmetric", True):
        raise refused(
            f"{where}.input_activations: only symmetric ones of 8 bits and of the weights' type are available"
        )
    moving = inputs.get("dynamic", False)  # of the whole tensor at once: that of each token is finer
    if moving is False and strategy == "tensor":
        return True
    if moving is not True or strategy not in dynamic:
        raise refused(
            f"{where}.input_activations: strategy {show(strategy)} with dynamic = {show(moving)} is not available"
        )
    return False


def _with(inputs: Mapping[str, Any]) -> str:
    return " with rounded inputs" if inputs else ""


def _rounded(inputs: Mapping[str, Any], static: bool) -> str:
    return f", {'static' if static else 'dynamic'} inputs" if inputs else ""
