"""A causal language model of transformers as a runner calls it: a `LanguageModel`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightllmd.architecture.outline import Outline
from lightllmd.errors import EngineError
from lightllmd.kernels.dispatch import Attention
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import Batch, Heads, TableRows
from lightllmd.models.hf.attention import StepAttention, received


class TransformersModel:
    """`module` computes all but attention: its base ends in hidden states, and what is left of it is the head."""

    rope = None
    capturable = False  # what its modules launch, and whether they wait for the device, is theirs

    def __init__(self, outline: Outline, module: nn.Module, attention: Attention) -> None:
        """Takes over `module`, which has its weights on the device."""
        self.spec = outline
        self.heads = [
            Heads(each.heads, each.kv_heads, each.head_dim, each.scale, 0.0, each.window, each.soft_cap)
            for each in outline.attention
        ]
        self.head = TransformersHead(module, outline.base)
        self._base = module.get_submodule(outline.base)
        self._attention = attention
        self._tensors: dict[str, Tensor] = {}
        stored: dict[int, str] = {}
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if stored.setdefault(tensor.untyped_storage().data_ptr(), name) == name:
                self._tensors[name] = tensor.detach()

    def scores(self, hidden: Tensor, places: Tensor) -> Tensor:
        """Raises EngineError."""
        raise EngineError("a model of transformers generates, it has no head that scores")

    def states(self, hidden: Tensor, places: Tensor) -> Tensor:
        """See `LanguageModel.states`: its base ends with the norm."""
        return hidden.index_select(0, places).float()

    def tensors(self) -> dict[str, Tensor]:
        """See `LanguageModel.tensors`."""
        return self._tensors

    def forward(
        self,
        batch: Batch,
        caches: list[LayerCache],
        beat: Callable[[], None],
        wanted: Tensor | None = None,
    ) -> Tensor:
        """See `LanguageModel.forward`."""
        step = StepAttention(self._attention, self.heads, caches, batch, beat)
        with received(step):
            out = self._base(**self._inputs(batch), position_ids=batch.positions.long()[None], use_cache=False)
        step.require_all()
        hidden: Tensor = out[0][0]
        return hidden if wanted is None else hidden.index_select(0, wanted)

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Ids, or where there are images the embeddings of all tokens."""
        tokens = _tokens(batch)[None]
        if batch.images is None:
            return {"input_ids": tokens}
        if len(batch.images.values) > 1:
            raise EngineError("a model of transformers takes images at its beginning alone")
        base: Any = self._base
        embed = base.get_input_embeddings()
        embedded: Tensor = embed(tokens)
        embedded[0].index_copy_(0, batch.images.places, batch.images.values[0])
        return {"inputs_embeds": embedded}


def _tokens(batch: Batch) -> Tensor:
    """``[T]`` int64. On a GPU the newest tokens are looked up, and the slots join the request->slot table."""
    rows = batch.metadata
    if not isinstance(rows, TableRows):
        return batch.tokens
    table_rows = batch.rows.long()
    rows.table.index_put_((table_rows, batch.positions.long()), batch.slots)
    return torch.where(batch.tokens < 0, rows.last[table_rows], batch.tokens).long()


class TransformersHead:
    """What a model does behind its base: the language model head, with all that scales or caps its logits."""

    def __init__(self, module: nn.Module, base: str) -> None:
        """`module` stays as it is."""
        self._known = _Known()
        self._module = _with(module, base.split("."), self._known)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 ``[R, vocab]`` of ``hidden [R, hidden]``."""
        self._known.hidden = hidden[None]
        tokens = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
        logits: Tensor = self._module(input_ids=tokens, use_cache=False).logits[0]
        return logits.float()


def _with(module: nn.Module, path: list[str], part: nn.Module) -> nn.Module:
    """`module` with another `part` at the place that `path` names; the rest is shared."""
    name, *rest = path
    changed = copy.copy(module)
    changed._modules = dict(module._modules)
    inner = module._modules[name]
    assert inner is not None
    changed._modules[name] = _with(inner, rest, part) if rest else part
    return changed


class _Known(nn.Module):
    """Stands where a base stood, and ends in hidden states that are known."""

    hidden: Tensor

    def forward(self, *_: Any, **__: Any) -> _Output:
        return _Output(self.hidden)


class _Output:
    """What a base returns, as an object and as a tuple: hidden states, and nothing of all the rest."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
