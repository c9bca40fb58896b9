"""Which version of each operation a device gets. Models call through the `Kernels` that they were given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightllmd.kernels import eager
from lightllmd.kernels.linear import DenseLinear, Linear, PackedLinear


@dataclass(frozen=True)
class Kernels:
    """The operations of one device and dtype; signatures are those of `eager`."""

    linear: Callable[[Tensor, Tensor | None], Linear]  # takes over the weight [out, in] and bias
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    gated: Callable[[Tensor, str], Tensor]
    rotate_: Callable[[Tensor, Tensor, Tensor], None]
    write_kv: Callable[[Tensor, Tensor, Tensor], None]
    decode_attention: Callable[[Tensor, Tensor, Tensor | slice, Tensor | None, float], Tensor]
    prefill_attention: Callable[[Tensor, Tensor, Tensor | slice, int, float], Tensor]


def kernels_for(device: torch.device, dtype: torch.dtype) -> Kernels:
    packed = device.type == "cpu" and PackedLinear.supports(dtype)
    return Kernels(
        linear=PackedLinear if packed else DenseLinear,
        rms_norm=eager.rms_norm,
        gated=eager.gated,
        rotate_=eager.rotate_,
        write_kv=eager.write_kv,
        decode_attention=eager.decode_attention,
        prefill_attention=eager.prefill_attention,
    )
