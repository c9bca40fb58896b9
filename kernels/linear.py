"""What a linear is: a matmul with a fixed weight that owns the weight in the form its kernels read, and fuses with it
what stands around it in a decoder. Its siblings, one for each device and way of storing weights, are in
`eager_linear` and `fused_linear`; `Kernels.linear` chooses among them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, overload

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


class Unfinished(ABC):
    """Inputs of a linear whose last step is left to it: it may round them in the same launch."""

    @abstractmethod
    def tensor(self) -> Tensor:
        """``[T, in]``, finished."""


@dataclass(frozen=True, eq=False)
class ScaledInputs(Unfinished):
    """Inputs that a linear rounds by scales of more than it sees: other ranks have the rest."""

    x: Tensor  # [T, in]
    largest: Tensor  # fp32 [T, G]: the largest magnitude of each group of inputs, of all ranks

    def tensor(self) -> Tensor:
        return self.x


@dataclass(frozen=True, eq=False)
class ProjectionNorm:
    """A norm of some columns of a projection, which are those of some heads."""

    norm: Norm  # the weight of these columns
    columns: slice
    size: int  # columns of all ranks together
    repeated: bool = False  # another rank has the same columns, too


class Linear(ABC):
    """A fixed map of ``[T, in]`` to ``[T, out]`` (``[T, out / 2]`` with an activation)."""

    def __init__(self, out_features: int, **tensors: Tensor | None) -> None:
        """`out_features`: rows of the weight, gate and up together. `tensors`: what lies on the device, by name."""
        self.out_features = out_features
        self._tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @overload
    def __call__(self, x: Tensor, *, norm: Norm | None = None, activation: str) -> Tensor | Unfinished: ...

    @overload
    def __call__(
        self,
        x: Tensor | Unfinished,
        *,
        norm: Norm | None = None,
        post_norm: Norm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor: ...

    def __call__(
        self,
        x: Tensor | Unfinished,
        *,
        norm: Norm | None = None,
        activation: str | None = None,
        post_norm: Norm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | Unfinished:
        """``residual + post_norm(activation(norm(x) @ weight.T + bias))``, each step where it is asked for.

        x: ``[T, in]``, unchanged. activation: a key of `reference.ACTIVATIONS`; the weight is gate above up, and the
        result ``act(gate) * up``, perhaps left `Unfinished`. residual: ``[T, out]``, given away: the result may be its
        buffer. All tensors have the model's dtype.
        """
        if not isinstance(x, Tensor):
            x = self._taken(x)
        if post_norm is None:
            return self._fused(x, norm, activation, residual)
        return self._post_normed(self._fused(x, norm, activation, None), post_norm, residual)

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds on the device, by name: those of its scheme, and ``bias`` where it has one. Their contents
        and memory may be exchanged in place between steps (a sleeping model's storage is freed and filled again)."""
        return self._tensors

    def _taken(self, x: Unfinished) -> Tensor | Unfinished:
        """What `_fused` is to be given instead; a kind of linear that finishes some inputs itself leaves those."""
        return x.tensor()

    @abstractmethod
    def _fused(self, x: Any, norm: Norm | None, activation: str | None, residual: Tensor | None) -> Any:
        """``residual + activation(norm(x) @ weight.T + bias)``; never both an activation and a residual. `x` and the
        result are tensors, but for what `_taken` leaves, and for an activation that is."""

    @abstractmethod
    def _post_normed(self, out: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
        """``residual + norm(out)``; `out` and `residual` are given away."""


class Embedding(ABC):
    """The rows of tokens, and how a step's residual stream begins. All that it holds on the device is `weight`."""

    def __init__(self, weight: Tensor) -> None:
        """`weight` ``[vocab, hidden]``, or of one rank."""
        self.weight = weight

    @abstractmethod
    def __call__(self, batch: Batch) -> Tensor:
        """The embedded tokens of a step, ``[T, hidden]``, times the scale if there is one."""


class Head(ABC):
    """The last norm and the language model head."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 ``[R, vocab]`` of ``hidden [R, hidden]``, capped where the model caps them.

        A 16-bit matmul is rounded when it is stored: around 25, where the best logits of real models lie, bf16 knows
        only every eighth, so that the best two often tie. The best of each row are therefore those of fp32 sums.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """As `Linear.tensors`, without the norm's weight; empty where the rows are the embedding's."""


class DenseHead(Head):
    """Of rows in the model's dtype."""

    def __init__(self, rows: Tensor, norm: Norm, *, tied: bool, soft_cap: float | None = None) -> None:
        """`rows` ``[vocab, hidden]``, which are the embedding's where `tied`."""
        self._rows, self._norm, self._soft_cap = rows, norm, soft_cap
        self._tensors = {} if tied else {"weight": rows}

    def tensors(self) -> dict[str, Tensor]:
        return self._tensors
