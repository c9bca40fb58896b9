"""The one decoder: runs any `DecoderSpec` on packed tokens over the token-slot KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightllmd.architecture.spec import DecoderSpec
from lightllmd.architecture.weights import Role, WeightSpec
from lightllmd.kernels.dispatch import Kernels
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import Batch, Heads, ImageRows
from lightllmd.kernels.linear import Head, Linear, Norm
from lightllmd.kernels.schemes import WHOLE, Shard
from lightllmd.models.layer import DecoderLayer, LayerWeights
from lightllmd.models.rope import Rope
from lightllmd.models.scores import ScoreLinear, Scores
from lightllmd.weights.loaded import LoadedWeight

LINEARS: frozenset[Role] = frozenset({"qkv", "attention_out", "gate_up", "down"})
SCORES: frozenset[Role] = frozenset({"score_inner", "score"})


class Decoder:
    """A `LanguageModel`. Takes over the weights that `weights` yields, dense or quantised, as they come. Those of one
    rank (`architecture.ranks`) compute its part of one, with the other ranks of the kernels' group.

    What its hidden states are for is `head`, or `scores` where the specification says so: it has one of the two, or
    none where its checkpoint has none. Those that have no `scores` have `states`.
    """

    capturable = True
    head: Head
    scores: Scores

    def __init__(
        self,
        spec: DecoderSpec,
        kernels: Kernels,
        weights: Iterable[LoadedWeight],
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.rope = Rope(spec.positions, device, spec.other_positions)
        self._tensors: dict[str, Tensor] = {}
        linears: list[dict[Role, Linear]] = [{} for _ in spec.layers]
        norms: list[dict[Role, Norm]] = [{} for _ in spec.layers]
        common: dict[Role, Tensor] = {}
        shards: dict[Role, Shard] = {}
        scores: list[ScoreLinear] = []
        for weight, tensor, bias in weights:
            if weight.role in SCORES:
                scores.append(ScoreLinear(tensor.float(), None if bias is None else bias.float()))
                self._tensors |= {f"{weight.key}.weight": scores[-1].weight}
                if (in_fp32 := scores[-1].bias) is not None:
                    self._tensors |= {f"{weight.key}.bias": in_fp32}
            elif weight.layer is None:
                common[weight.role], shards[weight.role] = tensor, _shard(weight)
            elif weight.role in LINEARS:
                linear = kernels.linear(weight.role, tensor, bias, shard=_shard(weight))
                linears[weight.layer][weight.role] = linear
                self._hold(weight.key, linear)
            else:
                norms[weight.layer][weight.role] = Norm(tensor, spec.norm.eps, spec.norm.offset)
                self._tensors[weight.key] = tensor
        self.embedding = kernels.embedding(common["embed"], spec.embedding_scale, shards["embed"])
        self.layers = [
            DecoderLayer(layer, spec, kernels, LayerWeights(*held))
            for layer, held in zip(spec.layers, zip(linears, norms, strict=True), strict=True)
        ]
        norm = Norm(common["norm"], spec.norm.eps, spec.norm.offset)
        self._kernels, self._norm = kernels, norm
        if spec.scores is not None:
            self.scores = Scores(kernels, norm, scores)
        elif spec.generates:
            role: Role = "embed" if spec.tied else "head"
            self.head = kernels.head(
                common[role], norm, tied=spec.tied, soft_cap=spec.logit_soft_cap, shard=shards[role]
            )
            self._hold("head", self.head)
        self._tensors |= {"embed": common["embed"], "norm": common["norm"]}

    @property
    def heads(self) -> list[Heads]:
        """Of the attention of each layer."""
        return [layer.attention.heads for layer in self.layers]

    def _hold(self, key: str, owner: Linear | Head) -> None:
        self._tensors |= {f"{key}.{name}": tensor for name, tensor in owner.tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        """All weights on the device in the form in which they are stored there, by names that do not change:
        "3.qkv.weight", "3.qkv.bias", "3.attention_norm", "embed". No two share memory. Between steps their storage may
        be freed and filled again in place."""
        return self._tensors

    def states(self, hidden: Tensor, places: Tensor) -> Tensor:
        """See `LanguageModel.states`."""
        x = hidden.index_select(0, places)
        self._kernels.normalise_(x, self._norm)
        return x.float()

    def forward(
        self,
        batch: Batch,
        caches: list[LayerCache],
        beat: Callable[[], None],
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Writes the step's keys and values into `caches`, one per layer, and returns the hidden states
        ``[T, hidden]`` of its tokens, or of those that are `wanted` [R], for `head` or `scores`. Calls `beat` once per
        layer."""
        x = self.embedding(batch)
        if batch.images is not None:
            return self._with_images(x, batch, batch.images, caches, beat, wanted)
        last = self.layers[-1]
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.forward(x, cache, batch, wanted if layer is last else None)
            beat()
        return x

    def _with_images(
        self,
        x: Tensor,
        batch: Batch,
        images: ImageRows,
        caches: list[LayerCache],
        beat: Callable[[], None],
        wanted: Tensor | None,
    ) -> Tensor:
        """Every rank has the embeddings of all images, so they come behind what the ranks make of ids together."""
        embeddings, *further = images.values
        x.index_copy_(0, images.places, embeddings)
        last = self.layers[-1] if len(further) < len(self.layers) else None
        for number, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            x = layer.forward(x, cache, batch, wanted if layer is last else None)
            if number < len(further):
                x.index_add_(0, images.places, further[number])
            beat()
        return x if last is not None or wanted is None else x.index_select(0, wanted)


def _shard(weight: WeightSpec) -> Shard:
    """What is here of all ranks' weight."""
    cut = weight.parts[0].cut
    if cut is None:
        return WHOLE
    begin = cut.runs[0][0] if cut.runs else cut.shape[cut.axis]
    return Shard(cut.axis, begin, cut.shape[cut.axis], weight.rounded_together)
