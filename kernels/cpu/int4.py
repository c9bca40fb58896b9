"""Linears of a CPU with weights of 4 bits: torch's own kernel for few rows; for many the weight is made dense.

torch's kernel has ``scale * (q - 8) + zero`` for each stored q, summed in fp32 with the scale and zero of a group, and
packs blocks of 64 outputs, which differ between CPUs. Where the blocks are known, their weight is made dense row by
row of inputs, as oneDNN then reads it.
"""

from __future__ import annotations

from functools import cache, partial

import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.architecture.cpu_storage import CPU_GROUPS, cpu_group
from lightllmd.architecture.schemes import Scheme
from lightllmd.kernels.eager_linear import EagerLinear
from lightllmd.kernels.quantised import QuantisedMatrix

BLOCK = 64  # outputs
ROWS = 16  # the number of outputs is a multiple of it
MIDDLE = 8  # what is subtracted from a stored value
# From so many rows on the weight is made dense. Measured on an AVX-512 CPU: in bf16 that costs what 72 rows do, in
# fp32, for which torch's kernel has no vectors, what one does. All matmuls of SmolLM2 take 0.3 (1 row), 0.6 (4),
# 0.9 (8), 1.4 (16), 2 (72) and 1.3 (256) of the time of a bf16 weight.
MANY_ROWS = {torch.float32: 1}
MANY_ROWS_OF_16_BITS = 72


class Int4Linear(EagerLinear):
    """Of a weight that `Int4Linears.takes`."""

    def __init__(self, dtype: torch.dtype, weight: QuantisedMatrix, bias: Tensor | None = None) -> None:
        """Takes over a weight and its bias ``[out]``, of a model that computes in `dtype`, to which scales are
        rounded."""
        rows, columns = weight.shape
        stored = weight.scheme.group or columns
        self._group = cpu_group(weight.scheme, columns)
        more_rows, self._more_columns = -rows % ROWS, -columns % self._group
        values = functional.pad(weight.values.int(), (0, self._more_columns, 0, more_rows))
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
        groups = values.shape[1] // self._group
        spread = partial(_spread, group=-(-stored // self._group), groups=groups, rows=more_rows)
        scales = spread(weight.scales.to(dtype).float())
        zeros = torch.zeros_like(scales) if weight.zeros is None else spread(weight.zeros.float())
        self.scale = torch.stack([scales, scales * (MIDDLE - zeros)], 2).to(dtype)  # [groups, rows, 2]
        self.order, self.bias = weight.order, bias
        self._rows = rows
        known = (rows + more_rows) % BLOCK == 0 and halves_of_blocks()
        self._many = MANY_ROWS.get(dtype, MANY_ROWS_OF_16_BITS) if known else None
        super().__init__(rows, weight=self.weight, scale=self.scale, order=self.order, bias=bias)

    def _matmul(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self.order is not None:
            x = x.index_select(1, self.order)
        if self._more_columns:
            x = functional.pad(x, (0, self._more_columns))
        if self._many is not None and len(x) >= self._many:
            out = x @ self._dense()
        else:
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self.weight, self._group, self.scale)
        if out.shape[1] != self._rows:
            out = out[:, : self._rows].contiguous()
        if self.bias is not None:
            out.add_(self.bias)
        return out if residual is None else out.add_(residual)

    def _dense(self) -> Tensor:
        """``[K, N]``: each number rounded once."""
        (groups, rows, _), dtype = self.scale.shape, self.scale.dtype
        scales, shifted = self.scale.unbind(2)
        zeros = MIDDLE - (shifted.float() / scales.float()).round_()  # rounding has moved them by less than a tenth
        values = unpacked(self.weight).view(groups, self._group, rows)
        return values.sub_(zeros.to(torch.int8)[:, None]).to(dtype).mul_(scales.contiguous()[:, None]).view(-1, rows)


class Int4Linears:
    """Makes those of a model that computes in `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, weight: QuantisedMatrix, bias: Tensor | None = None) -> Int4Linear:
        """Of a weight and its bias ``[out]``."""
        return Int4Linear(self._dtype, weight, bias)

    @staticmethod
    def takes(scheme: Scheme) -> bool:
        """Whether they can store a weight so."""
        return scheme.values == "uint4" and scheme.group % CPU_GROUPS[-1] == 0 and not scheme.inputs

    @staticmethod
    @cache
    def supported() -> bool:
        """Whether this build of torch has the kernel, and it computes what is said above."""
        values = torch.arange(ROWS * CPU_GROUPS[-1], dtype=torch.int32).view(ROWS, CPU_GROUPS[-1]) % 16
        scale = torch.full((1, ROWS, 2), 0.5, dtype=torch.bfloat16)
        each = torch.eye(CPU_GROUPS[-1], dtype=torch.bfloat16)
        try:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(each, packed, CPU_GROUPS[-1], scale)
        except (AttributeError, RuntimeError):
            return False
        return torch.equal(out.T.float(), (values - MIDDLE) * 0.5 + 0.5)


def _spread(each: Tensor, group: int, groups: int, rows: int) -> Tensor:
    """``[N, G]`` -> ``[groups, N + rows]`` where `group` of the kernel's are one of the scheme's; rows are added."""
    wide = each.repeat_interleave(group, 1)[:, :groups] if group > 1 else each
    return functional.pad(wide, (0, 0, 0, rows), value=1.0).T.contiguous()


def unpacked(weight: Tensor) -> Tensor:
    """``[N, K / 2]`` as torch has packed it -> ``[K, N]`` int8. A block of outputs has their first half in the low
    bits of its bytes, input after input; see `halves_of_blocks`."""
    rows, columns = len(weight), weight.shape[1] * 2
    packed = weight.view(rows // BLOCK, columns, BLOCK // 2)
    blocks = torch.stack([packed & 15, packed >> 4], 2).view(rows // BLOCK, columns, BLOCK)
    return blocks.transpose(0, 1).contiguous().view(torch.int8).view(columns, rows)


@cache
def halves_of_blocks() -> bool:
    """Whether torch packs so on this CPU."""
    values = torch.randint(0, 16, (2 * BLOCK, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return torch.equal(unpacked(torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)), values.T.to(torch.int8))
