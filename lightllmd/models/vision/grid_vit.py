"""Computes `GridVitSpec` and `MergerSpec`: patches of images of any sizes, packed, to image embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor

from lightllmd.architecture.vision.spec import GridVitSpec, MergerSpec
from lightllmd.models.vision.layers import Weight, Weights, activate, layer_norm, linear, rms_norm
from lightllmd.models.vision.patch_order import Grid, PatchRun, positions, wholes, windows

_Runs = Sequence[PatchRun]
_Orders = tuple[Tensor, Tensor] | None  # of the packed tokens among those of the images, and the other way round


class GridVit:
    """Runs any `GridVitSpec`."""

    def __init__(self, spec: GridVitSpec, weights: Weights) -> None:
        self._spec, self._weights = spec, weights
        self._patch = Weight(weights["patch"].weight.flatten(1), weights["patch"].bias)
        half = spec.head_dim // 2
        exponents = torch.arange(0, half, 2, device=self._patch.weight.device).float() / half
        self._frequencies = 1.0 / spec.rope_base**exponents

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self._patch.weight.dtype

    def features(self, patches: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """``patches [T, 3 * frames * patch * patch]``: of images with so many rows and columns of tokens, one behind
        the other, each in the order of `patch_order.positions`. Hidden states ``[T, hidden]`` in the same order: of
        each tap, then of the last layer."""
        spec, device = self._spec, patches.device
        places = [positions(grid, spec.merge) for grid in grids]
        x = linear(patches, self._patch)
        if spec.table is not None:
            x = x + self._stretched(places).to(x.dtype)
        angles = torch.from_numpy(np.concatenate(places, 1)).to(device)[:, :, None] * self._frequencies
        turns = torch.stack([angles.cos(), angles.sin()]).permute(0, 2, 1, 3).flatten(2)  # [2, T, head_dim / 2]
        whole = wholes(grids, spec.patches)
        if spec.window is None:
            return self._layers(x, turns, whole, whole, None)
        order, near = windows(grids, spec.window, spec.patches)
        packed = torch.from_numpy(order).to(device)
        back = packed.argsort()
        turns = torch.stack([self._by_token(each, packed) for each in turns])
        features = self._layers(self._by_token(x, packed), turns, near, whole, (packed, back))
        return [self._by_token(each, back) for each in features]

    def _layers(
        self, x: Tensor, turns: Tensor, near: list[PatchRun], whole: list[PatchRun], orders: _Orders
    ) -> list[Tensor]:
        features = []
        for layer in range(self._spec.layers):
            reordered = orders if layer in self._spec.whole else None
            runs = near if reordered is None else whole
            x = x + self._attention(self._norm(x, f"{layer}.norm1"), layer, turns, runs, reordered)
            x = x + self._feed_forward(self._norm(x, f"{layer}.norm2"), layer)
            if layer in self._spec.taps:
                features.append(x)
        return [*features, x]

    def _attention(self, x: Tensor, layer: int, turns: Tensor, runs: _Runs, orders: _Orders) -> Tensor:
        """`orders`: where the tokens of `runs` are packed otherwise than those of `x`."""
        spec = self._spec
        qkv = linear(x, self._weights[f"{layer}.qkv"]).view(len(x), 3, spec.heads, spec.head_dim)
        for part in (0, 1):
            _turn_(qkv[:, part], turns)
        if orders is not None:
            packed, back = orders
            attended = self._by_token(_attend(self._by_token(qkv, back), runs), packed)
        else:
            attended = _attend(qkv, runs)
        return linear(attended.flatten(1), self._weights[f"{layer}.out"])

    def _feed_forward(self, x: Tensor, layer: int) -> Tensor:
        spec, weights = self._spec, self._weights
        if spec.gated:
            gate, up = linear(x, weights[f"{layer}.gate_up"]).chunk(2, -1)
            inner = activate(gate, spec.activation) * up
        else:
            inner = activate(linear(x, weights[f"{layer}.up"]), spec.activation)
        return linear(inner, weights[f"{layer}.down"])

    def _norm(self, x: Tensor, kind: str) -> Tensor:
        return _normalised(x, self._weights[kind], self._spec.norm, self._spec.norm_eps)

    def _by_token(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The patches of `tokens`, token by token."""
        return x.reshape(-1, self._spec.patches, *x.shape[1:]).index_select(0, tokens).flatten(0, 1)

    def _stretched(self, places: Sequence[NDArray[np.int64]]) -> Tensor:
        """fp32 ``[T, hidden]``: the table of positions laid over each image, corner on corner, linear between."""
        side, table = self._spec.table or 0, self._weights["position"].weight
        entries: list[Tensor] = []
        shares: list[Tensor] = []
        for place in places:
            row, column = (_between(torch.from_numpy(axis), side) for axis in place)
            entries.append((row[0][:, :, None] * side + column[0][:, None, :]).flatten(1))
            shares.append((row[1][:, :, None] * column[1][:, None, :]).flatten(1))
        taken = table[torch.cat(entries).to(table.device)]  # [T, 4, hidden]
        return (taken * torch.cat(shares).to(table.device)[:, :, None]).sum(1)


class Merger:
    """Runs a `MergerSpec`."""

    def __init__(self, spec: MergerSpec, weights: Weights) -> None:
        self._spec, self._weights = spec, weights

    def embeddings(self, features: Sequence[Tensor]) -> Tensor:
        """``[1 + taps, tokens, outputs]`` of what `GridVit.features` returns: those of the last layer first."""
        *taps, last = features
        merged = [self._merged(tap, f"{number}.tap") for number, tap in enumerate(taps)]
        return torch.stack([self._merged(last, "merger"), *merged])

    def _merged(self, x: Tensor, kind: str) -> Tensor:
        spec, weights = self._spec, self._weights
        norm = weights[f"{kind}.norm"]
        x = x.view(-1, norm.weight.shape[0])  # patches, or all those of a token together
        x = _normalised(x, norm, spec.norm, spec.norm_eps).view(-1, spec.inner)
        return linear(functional.gelu(linear(x, weights[f"{kind}.fc1"])), weights[f"{kind}.fc2"])


def _normalised(x: Tensor, weight: Weight, kind: str, eps: float) -> Tensor:
    return layer_norm(x, weight, eps) if kind == "layer" else rms_norm(x, weight, eps)


def _between(places: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """``[T, 2]`` each: the two entries of one axis of a table of `side` that each of ``places [T]`` lies between, and
    how much it has of each."""
    at = places.float() * (side - 1) / max(int(places.max()), 1)
    low = at.floor()
    entries = (low.long()[:, None] + torch.arange(2)).clamp(max=side - 1)
    return entries, torch.stack([1 - (at - low), at - low], 1)


def _turn_(x: Tensor, turns: Tensor) -> None:
    """``x [T, H, D]`` in place, by the angles whose cosines and sines are ``turns [2, T, D / 2]``, in fp32."""
    cos, sin = turns[:, :, None]
    first, second = x.float().chunk(2, -1)
    half = x.shape[-1] // 2
    turned = first * cos - second * sin  # in fp32 both halves are still read
    x[..., half:] = second * cos + first * sin
    x[..., :half] = turned


def _attend(qkv: Tensor, runs: _Runs) -> Tensor:
    """``qkv [T, 3, H, D]`` -> ``[T, H, D]``: each patch attends to all of its group."""
    found = []
    for run in runs:
        group = qkv[run.first : run.first + run.count * run.length].unflatten(0, (run.count, run.length))
        query, key, value = group.permute(2, 0, 3, 1, 4)
        found.append(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(0, 1))
    return found[0] if len(found) == 1 else torch.cat(found)
