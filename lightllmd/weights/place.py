"""From a checkpoint, verified as a whole before, to the decoder's tensors, streamed one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightllmd.architecture.weights import Part, WeightSpec
from lightllmd.weights import staged
from lightllmd.weights.index import Checkpoint
from lightllmd.weights.loaded import LoadedWeight, Progress, room
from lightllmd.weights.plain import PlainCheckpoint


def stream(
    checkpoint: Checkpoint,
    weights: Sequence[WeightSpec],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> Iterator[LoadedWeight]:
    """Yields them in their order; holds nothing back, so the caller decides what stays.

    The checkpoint has been verified. Each part is converted to `dtype` on its way into its place. Raises WeightsInvalid
    where a file can't be read to its end.
    """
    if device.type == "cuda" and isinstance(checkpoint, PlainCheckpoint):
        arriving = staged.stream(checkpoint, weights, dtype, device, progress)
    else:
        arriving = _read(checkpoint, weights, dtype, device, progress)
    for loaded in arriving:
        yield _in_order(loaded) if loaded.spec.groups else loaded


def _in_order(loaded: LoadedWeight) -> LoadedWeight:
    """One whose rows came in groups (`WeightSpec.groups`)."""
    groups = loaded.spec.groups

    def ordered(rows: Tensor) -> Tensor:
        kinds = rows.unflatten(0, (-1, sum(groups))).split(groups, 1)
        return torch.cat([kind.flatten(0, 1) for kind in kinds])

    return LoadedWeight(loaded.spec, ordered(loaded.tensor), None if loaded.bias is None else ordered(loaded.bias))


def _read(
    checkpoint: Checkpoint,
    weights: Sequence[WeightSpec],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> Iterator[LoadedWeight]:
    """Each part is converted as it is read, and a tensor goes to the device when it is whole."""
    total = sum(checkpoint.tensors[part.name].nbytes for weight in weights for part in weight.stored)
    done = 0

    def stacked(parts: tuple[Part, ...]) -> Tensor:
        nonlocal done
        out = room(parts, dtype)
        row = 0
        for part in parts:
            for count in checkpoint.read(part.name, out[row : row + part.shape[0]]):
                done += count
                progress(done, total)
            row += part.shape[0]
        return out.to(device)

    for weight in weights:
        yield LoadedWeight(weight, stacked(weight.parts), stacked(weight.bias) if weight.bias else None)
