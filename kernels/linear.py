"""What a linear is: a matmul with a fixed weight that owns the weight in the form its kernels read, and fuses with it
what stands around it in a decoder. Its siblings, one for each device and way of storing weights, are in
`eager_linear` and `fused_linear`; `Kernels.linear` chooses among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightllmd.kernels.layout import Batch


@dataclass(frozen=True, eq=False)
class Norm:
    """Root mean square norm (Zhang and Sennrich 2019): ``x / sqrt(mean(x ** 2) + eps) * (offset + weight)``, in fp32,
    rounded once at the end.

    weight: ``[hidden]``, in the model's dtype. offset: 1 for families that store the weight less 1 (Gemma).
    """

    weight: Tensor
    eps: float
    offset: float = 0.0


class Linear(Protocol):
    """A fixed map of ``[T, in]`` to ``[T, out]`` (``[T, out / 2]`` with an activation)."""

    out_features: int  # rows of the weight: with an activation gate and up together

    def __call__(
        self,
        x: Tensor,
        *,
        norm: Norm | None = None,
        activation: str | None = None,
        post_norm: Norm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``residual + post_norm(activation(norm(x) @ weight.T + bias))``, each step where it is asked for.

        x: ``[T, in]``, unchanged. activation: a key of `reference.ACTIVATIONS`; the weight is gate above up,
        and the result ``act(gate) * up``. residual: ``[T, out]``, given away: the result may be its buffer.
        All tensors have the model's dtype.
        """

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds on the device, by name: those of its scheme, and ``bias`` where it has one. Their contents
        and memory may be exchanged in place between steps (a sleeping model's storage is freed and filled again)."""


class Embedding(Protocol):
    """The rows of tokens, and how a step's residual stream begins."""

    def __call__(self, batch: Batch) -> Tensor:
        """The embedded tokens of a step, ``[T, hidden]``, times the scale if there is one."""

    def tensors(self) -> dict[str, Tensor]:
        """As `Linear.tensors`."""


class Head(Protocol):
    """The last norm and the language model head."""

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 ``[R, vocab]`` of ``hidden [R, hidden]``, capped where the model caps them.

        A 16-bit matmul is rounded when it is stored: around 25, where the best logits of real models lie, bf16 knows
        only every eighth, so that the best two often tie. The best of each row are therefore those of fp32 sums.
        """

    def tensors(self) -> dict[str, Tensor]:
        """As `Linear.tensors`, without the norm's weight; without the weight's rows where they are the embedding's."""
