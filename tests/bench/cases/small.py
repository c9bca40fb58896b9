"""The small kernels of a layer: norm, rotation with cache write, gated activation. They are bound by memory."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as functional
from cases.products import DTYPE, EPS, SHAPES, Shape
from cases.timing import Deadline, Report, copies_for, median_us, require_close
from torch import Tensor

from lightllmd.kernels import reference
from lightllmd.kernels.activation import gated
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.linear import Norm
from lightllmd.kernels.norm import rms_norm
from lightllmd.kernels.rope_kv import rope_kv

TOKENS = (1, 64, 256, 8192)


def measure(name: str, report: Report) -> None:
    shape, deadline = SHAPES[name], Deadline(60)
    for tokens in TOKENS:
        if deadline.passed(f"small kernels at {tokens} tokens"):
            return
        with report.case(f"norm {tokens}"):
            norms(shape.hidden, tokens, report)
        with report.case(f"gated {tokens}"):
            activation(shape.intermediate, tokens, report)
        with report.case(f"rope_kv {tokens}"):
            rotation(shape, tokens, report)


def random(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, device="cuda", dtype=DTYPE)


def rate(size: int, us: float) -> float:
    """GB/s."""
    return size / us / 1e3


def norms(hidden: int, tokens: int, report: Report) -> None:
    size = 2 * tokens * hidden
    xs = [random(tokens, hidden) for _ in range(copies_for(2 * size, most=16))]
    weight, out = random(hidden), torch.full((tokens, hidden), float("nan"), device="cuda", dtype=DTYPE)
    norm = Norm(weight, EPS)
    rms_norm(xs[0], norm, out)
    require_close(out, reference.rms_norm(xs[0], weight, EPS), 1e-2)
    us = median_us([lambda x=x: rms_norm(x, norm, out) for x in xs])
    report.result("rms_norm", tokens=tokens, us=us, gbps=rate(2 * size, us))
    residual = random(tokens, hidden)
    rms_norm(xs[0], norm, out, residual)
    require_close(out, residual + reference.rms_norm(xs[0], weight, EPS), 1e-2)
    us = median_us([lambda x=x: rms_norm(x, norm, out, residual) for x in xs])
    report.result("rms_norm_add", tokens=tokens, us=us, gbps=rate(3 * size, us))


def activation(intermediate: int, tokens: int, report: Report) -> None:
    size = 2 * tokens * intermediate
    count = copies_for(3 * size, most=16)
    gates = [random(tokens, 2 * intermediate) for _ in range(count)]
    out = torch.full((tokens, intermediate), float("nan"), device="cuda", dtype=DTYPE)
    gated(gates[0], "silu", out)
    require_close(out, reference.gated(gates[0], "silu"), 1e-2)
    us = median_us([lambda x=x: gated(x, "silu", out) for x in gates])
    report.result("gated", tokens=tokens, us=us, gbps=rate(3 * size, us))


def rotation(shape: Shape, tokens: int, report: Report) -> None:
    heads, kv, dim = shape.heads, shape.kv_heads, shape.head_dim
    turned, total = heads + kv, heads + 2 * kv
    count = copies_for(2 * tokens * total * dim, most=16)
    slots = torch.randperm(tokens + 7, device="cuda")[:tokens].to(torch.int32)
    angles = torch.arange(tokens, device="cuda", dtype=torch.int32) % 4096
    turns = torch.rand(4096, dim // 2, device="cuda") * 6.28
    cos_sin = torch.cat([turns.cos(), turns.sin()], 1)
    qkvs = [random(tokens, total, dim) for _ in range(count)]
    caches = [LayerCache(random(tokens + 7, 2 * kv, dim)) for _ in range(count)]
    weights = torch.rand(dim, device="cuda", dtype=DTYPE) + 0.5
    for q_norm in (None, weights):
        before = qkvs[0].float()
        call = functools.partial(turn, shape, cos_sin, angles, slots, q_norm)
        call(qkvs[0], caches[0])
        queries = before[:, :turned]
        if q_norm is not None:
            queries = functional.rms_norm(queries, (dim,), weights.float(), EPS)
        cos, sin = (half[angles.long()][:, None] for half in cos_sin.chunk(2, 1))
        first, second = queries.chunk(2, -1)
        truth = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        require_close(qkvs[0][:, :turned], truth, 1e-2)
        kept = torch.cat(caches[0].gather(slots.long()), 1)
        require_close(kept, torch.cat([qkvs[0][:, heads:turned], qkvs[0][:, turned:]], 1), 1e-3)
        us = median_us([functools.partial(call, qkv, cache) for qkv, cache in zip(qkvs, caches, strict=True)])
        moved = 2 * tokens * dim * (2 * turned + kv + 2 * kv)  # read and write q and k, read v, write k and v
        report.result("rope_kv", tokens=tokens, head_norms=q_norm is not None, us=us, gbps=rate(moved, us))


def turn(
    shape: Shape, cos_sin: Tensor, angles: Tensor, slots: Tensor, norm: Tensor | None, qkv: Tensor, cache: LayerCache
) -> None:
    rope_kv(qkv, cos_sin, angles, slots, cache, shape.heads, shape.kv_heads, norm, norm, EPS)
