"""The gated activation of an MLP and the soft cap of logits in Triton. Meaning: `reference`."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The named activation of fp32 `x`; NaN stays NaN."""
    tl.static_assert(ACTIVATION == "silu" or ACTIVATION == "gelu" or ACTIVATION == "gelu_tanh" or ACTIVATION == "relu")
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh z) is the logistic function of 2 z.
        y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        y = tl.where(x < 0.0, 0.0, x)
    return y


@triton.jit
def _gated(gate_up, out, in_stride, out_stride, columns, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = gate_up + row * in_stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + columns, mask=inside, other=0.0).to(tl.float32)
    y = activate(gate, ACTIVATION) * up
    tl.store(out + row * out_stride + column, y.to(out.dtype.element_ty), mask=inside)


def gated(gate_up: Tensor, activation: str, out: Tensor) -> None:
    """``gate_up [T, 2I]``, gate first -> ``out [T, I]``; `activation` is a key of `reference.ACTIVATIONS`."""
    rows, columns = out.shape
    _gated[(rows, triton.cdiv(columns, BLOCK))](
        gate_up, out, gate_up.stride(0), out.stride(0), columns, ACTIVATION=activation, BLOCK=BLOCK, num_warps=4
    )


@triton.jit
def soft_capped(x, SOFT_CAP: tl.constexpr):
    """``cap * tanh(x / cap)`` of fp32 `x` (Gemma Team 2024, Gemma 2), where there is a cap; NaN stays NaN."""
    if SOFT_CAP > 0:
        # tanh z is 1 - 2 / (exp(2 z) + 1): no overflow becomes NaN.
        x = SOFT_CAP - 2 * SOFT_CAP / (1 + tl.exp(x * (2 / SOFT_CAP)))
    return x


@triton.jit
def _soft_cap(logits, count, SOFT_CAP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    tl.store(logits + at, soft_capped(tl.load(logits + at, mask=inside, other=0.0), SOFT_CAP), mask=inside)


def soft_cap_(logits: Tensor, cap: float) -> Tensor:
    """``cap * tanh(logits / cap)`` in place, of contiguous fp32 logits of any shape; returns them."""
    count = logits.numel()
    _soft_cap[(triton.cdiv(count, BLOCK),)](logits, count, SOFT_CAP=cap, BLOCK=BLOCK, num_warps=4)
    return logits


@triton.jit
def _quick_gelu(x, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + at, (y / (1.0 + tl.exp(-1.702 * y))).to(x.dtype.element_ty), mask=inside)


def quick_gelu_(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)`` in place (Hendrycks and Gimpel 2016), of contiguous `x` of any shape; returns it."""
    count = x.numel()
    _quick_gelu[(triton.cdiv(count, BLOCK),)](x, count, BLOCK=BLOCK, num_warps=4)
    return x
