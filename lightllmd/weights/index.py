"""A checkpoint as a table of named tensors, whatever its files are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lightllmd.architecture.families import architecture_of
from lightllmd.architecture.weights import TensorCut
from lightllmd.config.plan import ModelFacts
from lightllmd.config.stamps import require_unchanged
from lightllmd.weights.headers import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


class Checkpoint(Protocol):
    """Names are those of Hugging Face checkpoints; a format with other names translates them."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All that it holds, by name."""

    @property
    def readable(self) -> Collection[str]:
        """Types of stored tensors that `read` takes."""

    def read(self, name: str, out: Tensor, cut: TensorCut | None = None) -> Iterator[int]:
        """Fills `out` (the tensor's shape, or that of what `cut` has of it; any float dtype) and yields the bytes of
        each chunk that it has read.

        Raises WeightsInvalid when the file can't be read or holds a type that is no number for a weight.
        """


def open_checkpoint(facts: ModelFacts) -> Checkpoint:
    """Reads the headers again. Raises ModelChanged where the files are not those of the probe, WeightsInvalid."""
    require_unchanged(facts.weight_stamps)
    if facts.format == "gguf":
        from lightllmd.weights.gguf import GgufCheckpoint

        return GgufCheckpoint(facts.files[0])
    if facts.format == "deepspeed":
        from lightllmd.weights.deepspeed import deepspeed_tensors
        from lightllmd.weights.plain import PlainCheckpoint

        architecture = architecture_of(facts.model_type, facts.hf_config)
        return PlainCheckpoint(deepspeed_tensors([Path(file) for file in facts.files], architecture))
    from lightllmd.weights.safetensors import SafetensorsCheckpoint

    return SafetensorsCheckpoint(facts.files)
