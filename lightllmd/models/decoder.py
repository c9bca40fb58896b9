"""The one decoder: runs any `DecoderSpec` on packed tokens over the token-slot KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightllmd.architecture.spec import DecoderSpec
from lightllmd.architecture.weights import Role
from lightllmd.kernels.dispatch import Kernels
from lightllmd.kernels.layout import GroupedBatch, TableBatch
from lightllmd.kernels.linear import DenseLinear, Linear
from lightllmd.models.heads import LanguageHead
from lightllmd.models.layer import DecoderLayer, LayerWeights
from lightllmd.models.rope import Rope
from lightllmd.weights.loaded import LoadedWeight

MATRICES: frozenset[Role] = frozenset({"qkv", "attention_out", "gate_up", "down"})


class Decoder:
    """Takes over the weights that `weights` yields; each matrix is packed as soon as it has come."""

    def __init__(
        self,
        spec: DecoderSpec,
        kernels: Kernels,
        weights: Iterable[LoadedWeight],
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.rope = Rope(spec.positions, device)
        self._kernels = kernels
        linears: list[dict[Role, Linear]] = [{} for _ in spec.layers]
        norms: list[dict[Role, Tensor]] = [{} for _ in spec.layers]
        common: dict[Role, Tensor] = {}
        for weight, tensor, bias in weights:
            if weight.layer is None:
                common[weight.role] = tensor
            elif weight.role in MATRICES:
                linears[weight.layer][weight.role] = kernels.linear(tensor, bias)
            else:
                norms[weight.layer][weight.role] = tensor
        self.embedding = common["embed"]
        self.layers = [
            DecoderLayer(layer, spec, kernels, LayerWeights(*held))
            for layer, held in zip(spec.layers, zip(linears, norms, strict=True), strict=True)
        ]
        # The head is needed in rows too. Where it is the embedding, another layout of it may be had beside.
        rows = self.embedding if spec.tied else common["head"]
        head = kernels.linear(rows, None) if spec.tied else DenseLinear(rows)
        self.head = LanguageHead(kernels, common["norm"], spec.norm.eps, head, rows)

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
