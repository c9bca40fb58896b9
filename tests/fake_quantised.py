"""What the documented schemes make of weights and inputs, in fp64 and without any code of ours: the reference of tests
and of tests/bench/perplexity.py.

Scales are rounded to their dtype, quotients to fp32, quotients to integers (halves to even) or float8; see
`lightllmd.architecture.schemes` for which scheme has which.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightllmd.architecture.schemes import Scheme
from lightllmd.architecture.weight_schemes import WeightSchemes

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


class Stored(NamedTuple):
    """Numbers are ``scales * (values - zeros)``; all fp64 and of the matrix's shape."""

    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    @property
    def numbers(self) -> np.ndarray:
        return self.scales * (self.values - self.zeros)


def stored(weight: np.ndarray, scheme: Scheme, dtype: torch.dtype) -> Stored:
    """A weight ``[N, K]``, fp64, of a model in `dtype`."""
    rows, columns = weight.shape
    group = scheme.group or columns
    tall, wide = math.ceil(rows / scheme.rows) * scheme.rows, math.ceil(columns / group) * group
    padded = np.zeros((tall, wide))
    padded[:rows, :columns] = weight
    blocks = padded.reshape(tall // scheme.rows, scheme.rows, wide // group, group)
    kind = getattr(torch, scheme.scales) if scheme.scales else dtype
    if scheme.symmetric:
        most = LARGEST[scheme.values]
        scales, zeros = _scales(np.abs(blocks).max((1, 3), keepdims=True) / most, kind), np.zeros(())
        quotients = np.clip(_fp32(blocks / scales), -most, most)
        values = np.rint(quotients) if scheme.values == "int8" else _float8(quotients)
    else:
        low = np.minimum(blocks.min((1, 3), keepdims=True), 0)
        high = np.maximum(blocks.max((1, 3), keepdims=True), 0)
        scales = _scales(_fp32(high - low) / 15, kind)
        zeros = np.clip(np.rint(_fp32(-low / scales)), 0, 15)
        values = np.clip(np.rint(_fp32(blocks / scales)) + zeros, 0, 15)
    spread = (np.broadcast_to(each, blocks.shape).reshape(tall, wide) for each in (values, scales, zeros))
    return Stored(*(each[:rows, :columns] for each in spread))


def stored_inputs(x: np.ndarray, scheme: Scheme) -> Stored:
    """Inputs ``[T, K]``, each token by itself: times the inverse of its scale, which no magnitude below 2 ** -100
    makes."""
    tokens, columns = x.shape
    group = scheme.group or columns
    groups = np.pad(x, ((0, 0), (0, -columns % group))).reshape(tokens, -1, group)
    most, largest = LARGEST[scheme.inputs], np.abs(groups).max(2, keepdims=True).clip(2.0**-100)
    quotients = np.clip(_fp32(groups * _fp32(most / largest)), -most, most)
    values = np.rint(quotients) if scheme.inputs == "int8" else _float8(quotients)
    scales = np.broadcast_to(_fp32(largest / most), groups.shape)
    return Stored(*(each.reshape(tokens, -1)[:, :columns] for each in (values, scales)), np.zeros((1, 1)))


def _scales(exact: np.ndarray, kind: torch.dtype) -> np.ndarray:
    """1 where all is zero."""
    found = torch.from_numpy(_fp32(exact)).to(kind).double().numpy()
    return np.where(found > 0, found, 1.0)


def _fp32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(np.float64)


def _float8(x: np.ndarray) -> np.ndarray:
    """The nearest numbers with three bits of fraction and exponents from -6 (OCP 8-bit floating point, E4M3)."""
    steps = np.exp2(np.maximum(np.frexp(x)[1] - 1, -6) - 3)
    return np.rint(x / steps) * steps


class FakeQuantised:
    """transformers' model in fp32, whose decoder layers have the numbers that are stored for their weights, and inputs
    rounded as the scheme says. `model`: as the parameter model_dir."""

    def __init__(self, model: str, schemes: WeightSchemes, dtype: torch.dtype = torch.bfloat16) -> None:
        """`dtype`: which the engine computes in, so that weights are what it quantises."""
        self.model = _load(model)
        for number, layer in enumerate(self.model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            for role, parts in {
                "qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
                "attention_out": [attention.o_proj],
                "gate_up": [mlp.gate_proj, mlp.up_proj],
                "down": [mlp.down_proj],
            }.items():
                scheme = schemes.of(SimpleNamespace(role=role, layer=number, quantisable=True, group=0))
                if not scheme.dense:
                    _fake(parts, scheme, dtype)

    @torch.inference_mode()
    def mean_loss(self, windows: list[list[int]]) -> float:
        """Nats a token, of all but each window's first."""
        total, count = 0.0, 0
        for window in windows:
            ids = torch.tensor([window])
            logits = self.model(ids, use_cache=False).logits[0, :-1].double()
            chosen = logits.log_softmax(-1).gather(1, ids[0, 1:, None])
            total, count = total - chosen.sum().item(), count + len(chosen)
        return total / count


def _load(model: str) -> Any:
    from transformers import AutoModelForCausalLM

    from lightllmd.weights.locate import locate_model
    from transformers_gguf import load_gguf

    place = locate_model(model) if model.startswith("package:") else Path(model)
    if place.suffix == ".gguf":
        return load_gguf(place, torch.float32)
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


def _fake(parts: list[nn.Linear], scheme: Scheme, dtype: torch.dtype) -> None:
    """Of matrices that are stored one below the other."""
    whole = torch.cat([part.weight.data for part in parts]).to(dtype).double().numpy()
    numbers = torch.from_numpy(stored(whole, scheme, dtype).numbers).float()
    for part, weight in zip(parts, numbers.split([len(part.weight) for part in parts]), strict=True):
        part.weight.data = weight
        if scheme.inputs:
            part.register_forward_pre_hook(lambda _, given: _rounded_inputs(given[0], scheme))


def _rounded_inputs(x: Tensor, scheme: Scheme) -> Tensor:
    flat = x.flatten(0, -2).double().numpy()
    return torch.from_numpy(stored_inputs(flat, scheme).numbers).float().view_as(x)
