"""The one decoder: runs any `DecoderSpec` on packed tokens over the token-slot KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightllmd.kernels.dispatch import Kernels
from lightllmd.kernels.layout import GroupedBatch, Heads, TableBatch
from lightllmd.kernels.linear import DenseLinear, Linear
from lightllmd.models.heads import LanguageHead
from lightllmd.models.layers import DecoderLayer, Rope
from lightllmd.models.spec import DecoderSpec
from lightllmd.weights.layout import Weight


class Decoder:
    """Takes over the weights that `stream` yields; each product is packed as soon as it has come."""

    def __init__(
        self,
        spec: DecoderSpec,
        kernels: Kernels,
        weights: Iterable[Weight],
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.rope = Rope(spec.rope, device)
        self._kernels = kernels
        vectors: dict[str, Tensor] = {}
        products: dict[str, Linear] = {}
        for key, tensor, bias in weights:
            if tensor.dim() == 1 or key in ("embed", "head"):
                vectors[key] = tensor
            else:
                products[key] = kernels.linear(tensor, bias)
        self.embedding = vectors["embed"]
        self.heads = heads = Heads(spec.heads, spec.kv_heads, spec.head_dim, spec.attention_scale, spec.norm_eps)
        self.layers = [
            DecoderLayer(
                spec,
                kernels,
                heads,
                input_norm=vectors[f"{index}.input_norm"],
                qkv=products[f"{index}.qkv"],
                q_norm=vectors.get(f"{index}.q_norm"),
                k_norm=vectors.get(f"{index}.k_norm"),
                out=products[f"{index}.out"],
                mlp_norm=vectors[f"{index}.mlp_norm"],
                gate_up=products[f"{index}.gate_up"],
                down=products[f"{index}.down"],
            )
            for index in range(spec.layers)
        ]
        # The head is needed in rows too. Where it is the embedding, another layout of it may be had beside.
        rows = self.embedding if spec.tied else vectors["head"]
        head = kernels.linear(rows, None) if spec.tied else DenseLinear(rows)
        self.head = LanguageHead(kernels, vectors["norm"], spec.norm_eps, head, rows)

    def forward(
        self,
        batch: GroupedBatch | TableBatch,
        caches: list[Tensor],
        beat: Callable[[], None],
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Writes the step's keys and values into `caches` (one ``[S, 2K, D]`` per layer) and returns the hidden
        states ``[T, hidden]`` of its tokens, or of those that are `wanted` [R], for `head.logits`. Calls `beat` once
        per layer."""
        x = self._kernels.enter(batch, self.embedding)
        last = self.layers[-1]
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.forward(x, cache, batch, wanted if layer is last else None)
            beat()
        return x
