"""AWQ (Lin et al. 2024) as AutoAWQ writes it: ``quant_method = "awq"``, or a folder with a quant_config.json.

``qweight [K, N / 8]`` and ``qzeros [G, N / 8]`` hold the values of eight outputs in a word, outputs 0, 2, 4, 6,
1, 3, 5, 7 from the lowest bits on; ``scales [G, N]``. That is version "gemm".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightllmd.architecture.schemes import SCHEMES, Scheme
from lightllmd.errors import show
from lightllmd.weights.quantised.form import FLOATS, WORDS, CheckpointQuantisation, Form, FormTensor, words_of
from lightllmd.weights.quantised.settings import group_size, groups_in_words, listed, names, refused, whole, word

PER_WORD = 8


@dataclass(frozen=True)
class AwqForm(Form):
    """Of one module."""

    group: int  # 0: all inputs

    @property
    def scheme(self) -> Scheme:  # type: ignore[override]
        """Always with zeros."""
        return replace(SCHEMES["w4a16"], group=self.group)

    def fields(self, rows: int, columns: int) -> tuple[FormTensor, ...]:
        """As the module's head has them."""
        groups = self.scheme.groups(columns)
        return (
            FormTensor("values", ("qweight",), WORDS, ((columns, words_of(rows, PER_WORD)),)),
            FormTensor("zeros", ("qzeros",), WORDS, ((groups, words_of(rows, PER_WORD)),)),
            FormTensor("scales", ("scales",), FLOATS, ((groups, rows),)),
        )


def read(settings: Mapping[str, Any]) -> CheckpointQuantisation:
    """Raises ConfigInvalid."""
    bits = whole(settings, "bits", "w_bit")
    if bits != 4:
        raise refused(f"AWQ checkpoints of {bits} bits are not available; of 4 bits are")
    version = word(settings, "version", "checkpoint_format", "format", default="gemm")
    if version != "gemm":
        raise refused(f"AWQ checkpoints of version {show(version)} are not available; of version gemm are")
    form = AwqForm(group_size(settings, "group_size", "q_group_size", default=128))
    kept = names(settings, "modules_to_not_convert")

    def form_of(module: str, embedding: bool) -> Form | None:
        outside = embedding or ".layers." not in f".{module}"
        return None if outside or listed(module, kept) else form

    return CheckpointQuantisation(f"AWQ, 4 bits, {groups_in_words(form.group)}", form_of)
