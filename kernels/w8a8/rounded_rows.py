"""Inputs of a matmul rounded to 8 bits in Triton, in one launch with what stands before it: an RMS norm, or the gated
activation of an MLP. Meaning: `quantised.quantised_inputs` of `reference.rms_norm` or `reference.gated`, without a
rounding between them.

The factor that a norm gives to all of a token does not change what its values are rounded to, so it goes into the
scale: values are those of ``x * (offset + weight)``, whatever order the squares are summed in.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lightllmd.architecture.schemes import Scheme
from lightllmd.kernels.activation import activate, gated
from lightllmd.kernels.linear import Norm, Unfinished
from lightllmd.kernels.quantised import LEVELS, SMALLEST_INPUT


@dataclass(frozen=True, eq=False)
class QuantisedRows:
    """Inputs ``[T, K]`` of a matmul in 8 bits: ``values * scales``, group by group."""

    values: Tensor  # [T, K] int8 or float8_e4m3fn, contiguous
    scales: Tensor  # [G, T] fp32, contiguous


@triton.jit
def largest_of(y, SMALLEST: tl.constexpr):
    """The largest magnitude of each row of fp32 ``y [R, C]``, at least SMALLEST; NaN where one is: as integers the bits
    of magnitudes are in their order, and NaN's above infinity's."""
    least = tl.full([1], SMALLEST, tl.float32).to(tl.int32, bitcast=True)
    bits = tl.max(tl.abs(y).to(tl.int32, bitcast=True), 1)
    return tl.maximum(bits, least).to(tl.float32, bitcast=True)


@triton.jit
def rounded(y, factor, LEVEL: tl.constexpr, STATIC: tl.constexpr):
    """fp32 `y` times the inverse of its scale, to the nearest value of int8 (LEVEL 127) or else float8_e4m3fn, halves
    to even, still in fp32. `factor`: that inverse; with STATIC the scale itself, and values beyond reach are cut.

    Adding a number whose last bit is the distance between two values rounds to them. The product is a fused one with
    0, or it would be fused with that addition, and halves would be broken.
    """
    factor = tl.broadcast_to(factor, y.shape)
    if STATIC:
        least: tl.constexpr = -128.0 if LEVEL == 127.0 else -LEVEL
        y = tl.div_rn(y, factor)
        y = tl.where(y > LEVEL, LEVEL, y)
        y = tl.where(y < least, least, y)
    else:
        y = tl.fma(y, factor, tl.zeros_like(y))
    if LEVEL == 127.0:
        last = tl.full(y.shape, 12582912.0, tl.float32)
    else:
        exponent = tl.maximum((y.to(tl.int32, bitcast=True) >> 23) & 0xFF, 121)
        last = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return (y + last) - last


@triton.jit
def inputs_scale(largest, static, LEVEL: tl.constexpr):
    """Scales of groups of these largest magnitudes, and what `rounded` takes. What is not finite stays in the scale."""
    level = tl.full(largest.shape, LEVEL, tl.float32)
    if static is None:
        scale, factor = tl.div_rn(largest, level), tl.div_rn(level, largest)
    else:
        factor = tl.load(static) + tl.zeros_like(largest)
        scale = tl.where(largest < float("inf"), factor, largest)
    return scale, factor


@triton.jit
def _quantise(
    x,
    gain,
    static,
    largest,
    values,
    scales,
    x_stride,
    rows,
    columns,
    eps,
    OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LEVEL: tl.constexpr,
    SMALLEST: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program r: row r, as GROUPS times GROUP columns, some of which may be beyond the last."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < columns
    if gain is not None:
        scaled_by = tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
        if OFFSET != 0.0:
            scaled_by += OFFSET
    if PDL:
        gdc_wait()
    at = x + row * x_stride + column
    y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0
    if gain is not None:
        factor = tl.rsqrt(tl.sum(tl.sum(y * y, 1), 0) / columns + eps)
        y *= scaled_by
        if static is not None:
            y *= factor
            factor = 1.0
    if ACTIVATION is not None:
        y = activate(y, ACTIVATION) * tl.load(at + columns, mask=inside, other=0.0).to(tl.float32)
    if largest is None:
        most = largest_of(y, SMALLEST)
    else:
        shared = tl.load(largest + row * tl.cdiv(columns, GROUP) + group, mask=group * GROUP < columns, other=1.0)
        most = largest_of(shared[:, None], SMALLEST)
    scale, scaled = inputs_scale(most, static, LEVEL)
    y = rounded(y, scaled[:, None], LEVEL, static is not None)
    tl.store(values + row * columns + column, y.to(values.dtype.element_ty), mask=inside)
    tl.store(scales + group * rows + row, scale * factor, mask=group * GROUP < columns)


def quantise_rows(
    x: Tensor,
    scheme: Scheme,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    static: Tensor | None = None,
    largest: Tensor | None = None,
    pdl: bool = False,
) -> QuantisedRows:
    """``x [T, K]``, or ``norm(x)``, rounded as `scheme` says, K <= 65536; rows may lie apart.

    With an `activation` (a key of `reference.ACTIVATIONS`) x is ``[T, 2K]``, gate first, and what is rounded is
    ``act(gate) * up``. `static` ``[]``: the scale of all tokens, of static schemes. `largest`: as
    `quantised_inputs` has it, contiguous. `pdl`: as in `skinny.linear`; the
    kernel behind may be started while this one runs.
    """
    rows, width = x.shape
    columns = width // 2 if activation else width
    values = x.new_empty(rows, columns, dtype=getattr(torch, scheme.inputs))
    scales = x.new_empty(scheme.groups(columns), rows, dtype=torch.float32)
    group = scheme.group or triton.next_power_of_2(columns)
    groups = triton.next_power_of_2(len(scales))
    options = {"launch_pdl": True} if pdl else {}  # unknown to the interpreter
    _quantise[(rows,)](
        x,
        None if norm is None else norm.weight,
        static,
        largest,
        values,
        scales,
        x.stride(0),
        rows,
        columns,
        0.0 if norm is None else norm.eps,
        OFFSET=0.0 if norm is None else norm.offset,
        ACTIVATION=activation,
        LEVEL=LEVELS[scheme.inputs],
        SMALLEST=SMALLEST_INPUT,
        GROUPS=groups,
        GROUP=group,
        PDL=pdl,
        num_warps=min(16, max(4, groups * group // 1024)),
        **options,
    )
    return QuantisedRows(values, scales)


@dataclass(frozen=True, eq=False)
class GatedProduct(Unfinished):
    """The inputs of an MLP's second matmul before its activation: that matmul computes it with its own rounding.

    Made by a linear of quantised weights with many rows, which stores gate and up apart anyway; any linear takes it.
    """

    gate_up: Tensor  # [T, 2I], gate first
    activation: str  # a key of `reference.ACTIVATIONS`

    def tensor(self) -> Tensor:
        out = self.gate_up.new_empty(len(self.gate_up), self.gate_up.shape[1] // 2)
        gated(self.gate_up, self.activation, out)
        return out
