"""The attention function that transformers' modules call (its attention interface): ours, over the KV slots.

Which step is computed is a context variable, since not every module hands on what its model was called with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch.nn.functional as functional
from torch import Tensor
from transformers import AttentionInterface

from lightllmd.errors import EngineError
from lightllmd.kernels.dispatch import Attention
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import Batch, Heads

NAME, DRY = "lightllmd", "lightllmd_dry_run"  # as transformers knows it: in a step, and in a dry run


class Calls(Protocol):
    """What receives a forward's calls of attention, in their order."""

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, words: dict[str, Any]
    ) -> Tensor:
        """``query [1, H, T, D]``, ``key [1, K, T, D]``, ``value [1, K, T, V]`` -> ``[1, T, H, V]``. `words`: all that
        the module says beside them."""


_CALLS: ContextVar[Calls] = ContextVar("calls of attention")


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **words: Any
) -> tuple[Tensor, None]:
    return _CALLS.get().attend(module, query, key, value, attention_mask, words), None


# There is no mask of that name, so none is made: which tokens are seen is ours to know.
AttentionInterface.register(NAME, _attention)
AttentionInterface.register(DRY, _attention)


@contextmanager
def received(calls: Calls) -> Iterator[None]:
    """Calls of attention go to `calls` meanwhile."""
    token = _CALLS.set(calls)
    try:
        yield
    finally:
        _CALLS.reset(token)


class StepAttention:
    """`Calls` of one step: each has a cache of its own, and the shape that the plan knows of it."""

    def __init__(
        self,
        attention: Attention,
        heads: list[Heads],
        caches: list[LayerCache],
        batch: Batch,
        beat: Callable[[], None],
    ) -> None:
        self._attention, self._heads, self._caches = attention, heads, caches
        self._batch, self._beat = batch, beat
        self._calls = 0

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, words: dict[str, Any]
    ) -> Tensor:
        """Heads are padded with zeros to the size that the cache has: they change no score, and what they yield is
        cut off again."""
        if self._calls == len(self._heads):
            raise EngineError(f"the model calls attention more than {self._calls} times in a step, as it did before")
        heads, cache = self._heads[self._calls], self._caches[self._calls]
        self._calls += 1
        qkv = query.new_empty(query.shape[2], heads.query + 2 * heads.kv, heads.dim)
        for part, tensor in zip(qkv.split([heads.query, heads.kv, heads.kv], 1), (query, key, value), strict=True):
            part.copy_(functional.pad(tensor[0].transpose(0, 1), (0, heads.dim - tensor.shape[-1])))
        attended = self._attention(qkv.flatten(1), cache, self._batch, heads, None, None)
        self._beat()
        return attended.view(1, -1, heads.query, heads.dim)[..., : value.shape[-1]]

    def require_all(self) -> None:
        """Raises EngineError where the forward had fewer calls than the plan knows."""
        if self._calls != len(self._heads):
            raise EngineError(f"the model called attention {self._calls} times in a step, {len(self._heads)} before")


def said(error: Exception) -> str:
    """In one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
