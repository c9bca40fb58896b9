"""What a runner asks of a model, whatever computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from lightllmd.architecture.spec import GroupedQuery, ScoreHead
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import Batch, Heads
from lightllmd.models.rope import Rope


class Sizes(Protocol):
    """What a runner allocates by."""

    @property
    def vocab(self) -> int:
        """Tokens."""

    @property
    def attention(self) -> tuple[GroupedQuery, ...]:
        """Of each layer that has a KV cache."""

    @property
    def scores(self) -> ScoreHead | None:
        """The head that scores, if it ends in one."""

    @property
    def generates(self) -> bool:
        """It ends in logits."""


class Logits(Protocol):
    """The end of a model."""

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 ``[R, vocab]`` of ``hidden [R, hidden]``."""


class LanguageModel(Protocol):
    """A language model over the token-slot KV cache."""

    @property
    def spec(self) -> Sizes:
        """Its sizes."""

    @property
    def rope(self) -> Rope | None:
        """The angles that a step brings along; None where the model has its positions by itself."""

    @property
    def heads(self) -> list[Heads]:
        """Of the attention of each layer."""

    @property
    def head(self) -> Logits:
        """What turns hidden states into logits."""

    @property
    def capturable(self) -> bool:
        """Whether a step of one shape is the same launches each time, so that it can be a CUDA graph."""

    def scores(self, hidden: Tensor, places: Tensor) -> Tensor:
        """fp32 ``[R, values]`` of the rows ``places [R]`` of ``hidden [T, hidden]``, where `spec` has such a head."""

    def states(self, hidden: Tensor, places: Tensor) -> Tensor:
        """fp32 ``[R, hidden]``: the rows ``places [R]`` of ``hidden [T, hidden]`` behind the last norm, which is what
        transformers calls the last hidden state. Of a model that does not score."""

    def tensors(self) -> dict[str, Tensor]:
        """All weights on the device in the form in which they are stored there, by names that do not change:
        "3.qkv.weight", "3.qkv.bias", "3.attention_norm", "embed". No two share memory. Between steps their storage may
        be freed and filled again in place."""

    def forward(
        self,
        batch: Batch,
        caches: list[LayerCache],
        beat: Callable[[], None],
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Writes the step's keys and values into `caches`, one per layer, and returns the hidden states
        ``[T, hidden]`` of its tokens, or of those that are `wanted` [R], for `head.logits`. Calls `beat` once per
        layer."""
