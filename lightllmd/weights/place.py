"""From a checkpoint, checked as a whole before, to the decoder's tensors, streamed one by one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightllmd.weights import staged
from lightllmd.weights.index import Checkpoint
from lightllmd.weights.layout import Layout, Part, Progress, Weight
from lightllmd.weights.safetensors import SafetensorsCheckpoint


def stream(
    checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype, device: torch.device, progress: Progress
) -> Iterator[Weight]:
    """Yields (key, tensor, bias) in the layout's order; holds nothing back, so the caller decides what stays.

    The checkpoint has been checked. Each part is converted to `dtype` on its way into its place.
    """
    if device.type == "cuda" and isinstance(checkpoint, SafetensorsCheckpoint):
        return staged.stream(checkpoint, layout, dtype, device, progress)
    return _read(checkpoint, layout, dtype, device, progress)


def _read(
    checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype, device: torch.device, progress: Progress
) -> Iterator[Weight]:
    """Each part is converted as it is read, and a tensor goes to the device when it is whole."""
    every = [part for target in layout.targets for part in target.parts + target.bias]
    total = sum(checkpoint.tensors[part.name].nbytes for part in every)
    done = 0

    def stacked(parts: tuple[Part, ...]) -> Tensor:
        nonlocal done
        out = torch.empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), dtype=dtype)
        row = 0
        for part in parts:
            for count in checkpoint.read(part.name, out[row : row + part.shape[0]]):
                done += count
                progress(done, total)
            row += part.shape[0]
        return out.to(device)

    for target in layout.targets:
        yield target.key, stacked(target.parts), stacked(target.bias) if target.bias else None
