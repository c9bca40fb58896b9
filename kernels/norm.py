"""Root mean square norm in Triton, alone and behind the residual add. Meaning: `reference`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(
    x,
    residual,
    weight,
    out,
    x_stride,
    residual_stride,
    out_stride,
    columns,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        at = residual + row * residual_stride + column
        # The norm is of the sum as it is stored, so that fused and separate calls agree.
        total = (wide + tl.load(at, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(at, total, mask=inside)
        wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / columns + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, (wide * scale * gain).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """``x [T, N]`` -> ``out [T, N]`` (may be `x`), N <= 65536; rows may lie apart."""
    _launch(x, x, weight, eps, out, False)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """``residual += x`` in place, then `out` (may be `x`) becomes the norm of `residual`; all ``[T, N]``."""
    _launch(x, residual, weight, eps, out, True)


def _launch(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, add: bool) -> None:
    rows, columns = x.shape
    block = triton.next_power_of_2(columns)
    _rms_norm[(rows,)](
        x,
        residual,
        weight,
        out,
        x.stride(0),
        residual.stride(0),
        out.stride(0),
        columns,
        eps,
        ADD=add,
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
    )
