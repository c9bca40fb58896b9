"""From a checkpoint, verified as a whole before, to the decoder's tensors, streamed one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lightllmd.architecture.weight_schemes import ALL_DENSE, WeightSchemes
from lightllmd.architecture.weights import WeightSpec
from lightllmd.kernels.quantised import QuantisedMatrix
from lightllmd.weights import staged
from lightllmd.weights.arriving import ArrivingWeight, Loading, source_bytes
from lightllmd.weights.index import Checkpoint
from lightllmd.weights.loaded import LoadedWeight, Progress
from lightllmd.weights.plain import PlainCheckpoint
from lightllmd.weights.quantised.stored import Matrices
from lightllmd.weights.rank_parts import in_order


def stream(
    checkpoint: Checkpoint,
    weights: Sequence[WeightSpec],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    passing: Sequence[WeightSpec] = (),
    matrices: Matrices | None = None,
    schemes: WeightSchemes = ALL_DENSE,
) -> Iterator[LoadedWeight]:
    """Yields them in their order; holds nothing back, so the caller decides what stays: of `passing` nothing may, when
    the next is asked for (`Rooms`).

    The checkpoint has been verified. Each part is converted to `dtype` on its way into its place. Of the parts in
    `matrices`, which the files hold quantised, a weight that `schemes` has quantised is made a `QuantisedMatrix`; any
    other is made dense. Raises WeightsInvalid where a file can't be read to its end, or holds what its format does not
    allow.
    """
    if device.type == "cuda" and isinstance(checkpoint, PlainCheckpoint):
        arriving = staged.stream(checkpoint, weights, dtype, device, progress, passing, matrices, schemes)
    else:
        arriving = _read(checkpoint, weights, Loading(dtype, device, passing, matrices or {}, schemes), progress)
    yield from map(in_decoder_order, arriving)  # which keeps none while the next is read


def in_decoder_order(loaded: LoadedWeight) -> LoadedWeight:
    """Rows that came in groups (`WeightSpec.groups`) as the decoder has them."""
    if not loaded.spec.groups:
        return loaded
    ordered = partial(in_order, groups=loaded.spec.groups)
    tensor, bias = loaded.tensor, loaded.bias
    matrix = ordered(tensor) if isinstance(tensor, Tensor) else tensor.by_rows(ordered)
    return LoadedWeight(loaded.spec, matrix, None if bias is None else ordered(bias))


def _read(
    checkpoint: Checkpoint, weights: Sequence[WeightSpec], how: Loading, progress: Progress
) -> Iterator[LoadedWeight]:
    """Each part is converted as it is read, and a tensor goes to the device when it is whole."""
    total = sum(source_bytes(weight, checkpoint.tensors, how.matrices) for weight in weights)
    here = replace(how, device=torch.device("cpu"))
    rooms, elsewhere = here.rooms, None if how.device.type == "cpu" else how.rooms
    done = 0
    for weight in weights:
        arriving = ArrivingWeight(weight, here, rooms)
        for target in arriving.targets:
            for count in checkpoint.read(*target):
                done += count
                progress(done, total)
        _, tensor, bias = arriving.whole()
        if isinstance(tensor, QuantisedMatrix):
            tensor = tensor.to(how.device)
        elif elsewhere is not None:
            tensor = elsewhere.of(weight).copy_(tensor)
        yield LoadedWeight(weight, tensor, None if bias is None else bias.to(how.device))
        del arriving, target, tensor, bias  # nothing is kept while the next is made
