"""Root mean square norm in Triton, alone and with the residual add behind it. Meaning: `reference`."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightllmd.kernels.linear import Norm


@triton.jit
def _rms_norm(
    x,
    weight,
    residual,
    out,
    x_stride,
    residual_stride,
    out_stride,
    columns,
    eps,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / columns + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if OFFSET != 0.0:
        gain += OFFSET
    y = wide * scale * gain
    if residual is not None:
        y += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, y.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, norm: Norm, out: Tensor, residual: Tensor | None = None) -> None:
    """``x [T, N]`` -> ``out [T, N] = norm(x) + residual``, N <= 65536; rows may lie apart.

    `out` may be `x` or `residual`. fp32 inside, rounded once.
    """
    rows, columns = x.shape
    block = triton.next_power_of_2(columns)
    _rms_norm[(rows,)](
        x,
        norm.weight,
        residual,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        columns,
        norm.eps,
        OFFSET=norm.offset,
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
    )
