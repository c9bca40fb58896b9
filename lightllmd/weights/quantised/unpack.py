"""From the tensors of a stored matrix to the neutral form that linears are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightllmd.errors import WeightsInvalid
from lightllmd.kernels.quantised import QuantisedMatrix
from lightllmd.weights.quantised.awq import AwqForm
from lightllmd.weights.quantised.compressed_tensors import PackedForm
from lightllmd.weights.quantised.elementwise import ElementwiseForm
from lightllmd.weights.quantised.form import Form, Kind
from lightllmd.weights.quantised.gptq import GptqForm
from lightllmd.weights.quantised.stored import StoredMatrix

Raw = Mapping[Kind, Tensor]  # as they were read, in the types of the files
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where among the values of a word each output is


def unpack(matrix: StoredMatrix, raw: Raw, dtype: torch.dtype) -> QuantisedMatrix:
    """What was stored, on the device where `raw` is. `dtype`: of scales where the scheme names none. Raises
    WeightsInvalid naming file and tensor."""
    parts = UNPACK[type(matrix.form)](matrix, raw)
    scheme, (rows, columns) = matrix.form.scheme, matrix.shape
    scales = _spread(raw["scales"] if parts.scales is None else parts.scales, scheme.rows, rows)
    scales = scales.to(getattr(torch, scheme.scales) if scheme.scales else dtype).contiguous()
    zeros = None if scheme.symmetric else parts.zeros
    made = QuantisedMatrix(scheme, parts.values, scales, zeros, None, _input_scale(matrix, raw))
    if (groups := raw.get("groups")) is None:
        return replace(made, scheme=replace(scheme, ordered=False))
    order = _order(matrix, groups.long(), scheme.group or columns)
    if order is None:
        return replace(made, scheme=replace(scheme, ordered=False))
    values = made.values.index_select(1, order)
    return replace(made, scheme=replace(scheme, ordered=True), values=values, order=order.int())


@dataclass(frozen=True)
class _Parts:
    values: Tensor  # [N, K]
    zeros: Tensor | None = None  # [N, G]
    scales: Tensor | None = None  # [N, G]; None: as they were read


def _gptq(matrix: StoredMatrix, raw: Raw) -> _Parts:
    form: Any = matrix.form
    rows, columns = matrix.shape
    values = _from_words(raw["values"].t(), form.bits, columns)
    zeros = _from_words(raw["zeros"], form.bits, rows).t().contiguous()
    middle = 1 << (form.bits - 1)
    # Symmetric means this zero. Files of GPTQModel 5 say the first format and have the zeros of the second.
    if form.symmetric and ((zeros == middle) | (zeros == middle - 1)).all():
        zeros = torch.full_like(zeros, middle)
    elif form.less_one:
        zeros = zeros.to(torch.int16) + 1
    scales = raw["scales"].t()
    if form.bits == 4:
        return _Parts(values, zeros.to(torch.uint8), scales)
    if not form.symmetric:
        return _Parts(values, zeros.to(torch.int16), scales)
    if not (zeros == middle).all():
        raise _wrong(matrix, "zeros", f"has zeros other than {middle}, the quantisation says sym = true")
    return _Parts(_signed(values), None, scales)


def _awq(matrix: StoredMatrix, raw: Raw) -> _Parts:
    rows, _ = matrix.shape

    def outputs(words: Tensor) -> Tensor:
        """``[X, N / 8]`` -> ``[N, X]``."""
        places = _from_words(words, 4, 8 * words.shape[1]).unflatten(1, (-1, 8))
        return places[..., AWQ_PLACES].flatten(1)[:, :rows].t().contiguous()

    return _Parts(outputs(raw["values"]), outputs(raw["zeros"]), raw["scales"].t())


def _packed(matrix: StoredMatrix, raw: Raw) -> _Parts:
    form: Any = matrix.form
    rows, columns = matrix.shape
    if "shape" in raw and raw["shape"].tolist() != [rows, columns]:
        raise _wrong(matrix, "shape", f"says {raw['shape'].tolist()}, the config says {[rows, columns]}")
    values = _from_words(raw["values"], form.bits, columns)
    if form.symmetric and form.bits == 8:
        return _Parts(_signed(values))
    groups = form.scheme.groups(columns)
    if form.symmetric:
        return _Parts(values, torch.full((rows, groups), 8, dtype=torch.uint8, device=values.device))
    zeros = _from_words(raw["zeros"].t(), form.bits, rows).t().contiguous()
    return _Parts(values, zeros if form.bits == 4 else zeros.to(torch.int16))


def _elementwise(matrix: StoredMatrix, raw: Raw) -> _Parts:
    scheme, (rows, _) = matrix.form.scheme, matrix.shape
    values, zeros = raw["values"], raw.get("zeros")
    if scheme.symmetric:
        if zeros is not None and zeros.any():
            raise _wrong(matrix, "zeros", "has zeros other than 0, the quantisation says that it is symmetric")
        return _Parts(values)
    shifted = values.view(torch.uint8) ^ 128
    return _Parts(shifted, _spread(raw["zeros"], scheme.rows, rows).to(torch.int16) + 128)


UNPACK: dict[type[Form], Callable[[StoredMatrix, Raw], _Parts]] = {
    GptqForm: _gptq,
    AwqForm: _awq,
    PackedForm: _packed,
    ElementwiseForm: _elementwise,
}


def _from_words(words: Tensor, bits: int, count: int) -> Tensor:
    """``[R, C]`` int32, each with ``32 / bits`` values from its lowest bits on -> ``[R, count]`` uint8."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 4:
        octets = torch.stack([octets & 15, octets >> 4], 2).flatten(1)
    return octets[:, :count]


def _signed(values: Tensor) -> Tensor:
    """0 to 255 with a zero of 128 -> int8."""
    return (values ^ 128).view(torch.int8)


def _spread(scales: Tensor, block: int, rows: int) -> Tensor:
    """What all have, or each row, or each block of rows -> ``[N, G]``."""
    if scales.dtype is torch.float8_e8m0fnu:
        scales = scales.float()
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(rows, 1)
    if scales.dim() == 1:
        return scales[:, None]
    return scales if block == 1 else scales.repeat_interleave(block, 0)[:rows]


def _input_scale(matrix: StoredMatrix, raw: Raw) -> Tensor | None:
    if not matrix.form.scheme.static:
        return None
    if "input_zero" in raw and raw["input_zero"].float().any():
        raise _wrong(matrix, "input_zero", "is not 0: static inputs that are not symmetric are not available")
    scale = raw["input_scale"].float().reshape(())
    if not scale > 0:
        raise _wrong(matrix, "input_scale", f"is {scale.item():g}, a positive number is needed")
    return scale


def _order(matrix: StoredMatrix, groups: Tensor, size: int) -> Tensor | None:
    """Which input each column is of, where columns are sorted by the group of their inputs; None: they are as they
    stand. Some tools write the same for all inputs where there is no order."""
    columns = len(groups)
    plain = torch.arange(columns, device=groups.device) // size
    if torch.equal(groups, plain) or bool((groups == groups[0]).all() & (groups[0] <= 0)):
        return None
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order], plain):
        last = -(-columns // size) - 1
        raise _wrong(matrix, "groups", f"does not have each group from 0 to {last} for {size} inputs")
    return order


def _wrong(matrix: StoredMatrix, kind: Kind, fault: str) -> WeightsInvalid:
    found = matrix.tensors[kind]
    return WeightsInvalid(f"{found.file}: tensor {found.name} {fault}")
