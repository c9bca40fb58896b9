"""GPTQ (Frantar et al. 2023) as AutoGPTQ and GPTQModel write it: ``quant_method = "gptq"``, or a folder with a
quantize_config.json.

``qweight [K / 8, N]`` and ``qzeros [G, N / 8]`` hold eight 4-bit values in a word (four of 8 bits), the first in the
lowest bits; ``scales [G, N]``; ``g_idx [K]``, the group of each input. Zeros are stored less 1, but for
``checkpoint_format = "gptq_v2"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightllmd.architecture.schemes import SCHEMES, Scheme
from lightllmd.errors import show
from lightllmd.weights.quantised.form import FLOATS, WORDS, CheckpointQuantisation, Form, FormTensor, words_of
from lightllmd.weights.quantised.settings import (
    group_size,
    groups_in_words,
    matches,
    names,
    refused,
    switch,
    table,
    whole,
    word,
)

BITS = (4, 8)
FORMATS = ("gptq", "gptq_v2")
MOST_RULES = 10_000  # of `dynamic`


@dataclass(frozen=True)
class GptqForm(Form):
    """Of one module."""

    bits: int
    group: int  # 0: all inputs
    symmetric: bool
    less_one: bool  # zeros are stored less 1
    ordered: bool

    @property
    def scheme(self) -> Scheme:  # type: ignore[override]
        """8 bits that are symmetric need no zeros: the values are those of int8."""
        if self.bits == 4:
            return replace(SCHEMES["w4a16"], group=self.group, ordered=self.ordered)
        eight = replace(SCHEMES["w8a16"], group=self.group, ordered=self.ordered)
        return eight if self.symmetric else replace(eight, values="uint8", symmetric=False)

    def fields(self, rows: int, columns: int) -> tuple[FormTensor, ...]:
        """As the module's head has them."""
        per_word, groups = 32 // self.bits, self.scheme.groups(columns)
        return (
            FormTensor("values", ("qweight",), WORDS, ((words_of(columns, per_word), rows),)),
            FormTensor("zeros", ("qzeros",), WORDS, ((groups, words_of(rows, per_word)),)),
            FormTensor("scales", ("scales",), FLOATS, ((groups, rows),)),
            FormTensor("groups", ("g_idx",), WORDS | {"I64"}, ((columns,),), optional=not self.ordered),
        )


def read(settings: Mapping[str, Any]) -> CheckpointQuantisation:
    """Raises ConfigInvalid."""
    form = word(settings, "checkpoint_format", "format", default="gptq")
    if form not in FORMATS or switch(settings, "is_marlin_format", False):
        named = form if form not in FORMATS else "marlin"
        raise refused(f"GPTQ checkpoints in the layout {show(named)} are not available; {' and '.join(FORMATS)} are")
    packed = word(settings, "pack_dtype", default="int32")
    if packed != "int32":
        raise refused(f"quantization_config.pack_dtype is {show(packed)}, int32 is available")
    whole_model = _form(settings, {}, form == "gptq")
    rules = table(settings, "dynamic")
    if len(rules) > MOST_RULES:
        raise refused(f"quantization_config.dynamic has {len(rules)} entries, at most {MOST_RULES} are available")
    of_rules = {pattern: _rule(pattern, rule, settings, form == "gptq") for pattern, rule in rules.items()}
    head, inside = switch(settings, "lm_head", False), _inside(settings)

    def form_of(module: str, embedding: bool) -> Form | None:
        for pattern, own in of_rules.items():
            if matches(pattern.removeprefix("-:").removeprefix("+:"), module):
                return own
        if embedding or (".layers." not in f".{module}" and not head):
            return None
        return whole_model if not inside or any(module.endswith(f".{one}") for one in inside) else None

    order = ", act-order" if whole_model.ordered else ""
    others = f", {len(of_rules)} rules for some modules" if of_rules else ""
    symmetric = "symmetric" if whole_model.symmetric else "with zeros"
    grouped = groups_in_words(whole_model.group)
    return CheckpointQuantisation(f"GPTQ, {whole_model.bits} bits, {grouped}, {symmetric}{order}{others}", form_of)


def _form(settings: Mapping[str, Any], changes: Mapping[str, Any], less_one: bool) -> GptqForm:
    merged = {**settings, **changes}
    bits = whole(merged, "bits", "w_bit")
    if bits not in BITS:
        raise refused(f"GPTQ checkpoints of {bits} bits are not available; of {' and '.join(map(str, BITS))} bits are")
    return GptqForm(
        bits,
        group_size(merged, "group_size", "q_group_size", default=128),
        switch(merged, "sym", True),
        less_one,
        switch(merged, "desc_act", False),
    )


def _rule(pattern: str, rule: Any, settings: Mapping[str, Any], less_one: bool) -> Form | None:
    """None: what it is for is not quantised. Its pattern is tried."""
    matches(pattern.removeprefix("-:").removeprefix("+:"), "")
    if pattern.startswith("-:"):
        return None
    if not isinstance(rule, dict):
        raise refused(f"quantization_config.dynamic: {show(pattern)} is {show(rule)}, an object is needed")
    return _form(settings, rule, less_one)


def _inside(settings: Mapping[str, Any]) -> list[str]:
    """modules_in_block_to_quantize: the only modules of a layer that are quantised; a list of lists, or a list."""
    value = settings.get("modules_in_block_to_quantize")
    flat = [one for part in value for one in (part if isinstance(part, list) else [part])] if value else []
    return names({"modules_in_block_to_quantize": flat}, "modules_in_block_to_quantize")
