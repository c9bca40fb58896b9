"""From a checkpoint, verified as a whole before, to the decoder's tensors, streamed one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightllmd.architecture.weights import Part, WeightSpec
from lightllmd.weights import staged
from lightllmd.weights.index import Checkpoint
from lightllmd.weights.loaded import LoadedWeight, Progress, Rooms, room
from lightllmd.weights.plain import PlainCheckpoint


def stream(
    checkpoint: Checkpoint,
    weights: Sequence[WeightSpec],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    passing: Sequence[WeightSpec] = (),
) -> Iterator[LoadedWeight]:
    """Yields them in their order; holds nothing back, so the caller decides what stays: of `passing` nothing may, when
    the next is asked for (`Rooms`).

    The checkpoint has been verified. Each part is converted to `dtype` on its way into its place. Raises WeightsInvalid
    where a file can't be read to its end.
    """
    if device.type == "cuda" and isinstance(checkpoint, PlainCheckpoint):
        arriving = staged.stream(checkpoint, weights, dtype, device, progress, passing)
    else:
        arriving = _read(checkpoint, weights, dtype, device, progress, passing)
    yield from map(_in_order, arriving)  # which keeps none while the next is read


def _in_order(loaded: LoadedWeight) -> LoadedWeight:
    """Also one whose rows came in groups (`WeightSpec.groups`)."""
    groups = loaded.spec.groups
    if not groups:
        return loaded

    def ordered(rows: Tensor) -> Tensor:
        kinds = rows.unflatten(0, (-1, sum(groups))).split(groups, 1)
        return torch.cat([kind.flatten(0, 1) for kind in kinds])

    tensor, bias = loaded.tensor, loaded.bias
    matrix = ordered(tensor) if isinstance(tensor, Tensor) else tensor.by_rows(ordered)
    return LoadedWeight(loaded.spec, matrix, None if bias is None else ordered(bias))


def _read(
    checkpoint: Checkpoint,
    weights: Sequence[WeightSpec],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    passing: Sequence[WeightSpec],
) -> Iterator[LoadedWeight]:
    """Each part is converted as it is read, and a tensor goes to the device when it is whole."""
    total = sum(checkpoint.tensors[part.name].nbytes for weight in weights for part in weight.stored)
    rooms = Rooms(dtype, None, passing)
    elsewhere = None if device.type == "cpu" else Rooms(dtype, device, passing)
    done = 0

    def fill(parts: tuple[Part, ...], out: Tensor) -> Tensor:
        nonlocal done
        row = 0
        for part in parts:
            for count in checkpoint.read(part.name, out[row : row + part.shape[0]]):
                done += count
                progress(done, total)
            row += part.shape[0]
        return out

    for weight in weights:
        tensor = fill(weight.parts, rooms.of(weight))
        if elsewhere is not None:
            tensor = elsewhere.of(weight).copy_(tensor)
        bias = fill(weight.bias, room(weight.bias, dtype)).to(device) if weight.bias else None
        yield LoadedWeight(weight, tensor, bias)
        del tensor, bias  # nothing is kept while the next is made
