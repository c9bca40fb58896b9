"""The weights of a GGUF file on their way to a decoder: those whose blocks stay as they are, and the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

import torch

from lightllmd.architecture.schemes import Scheme
from lightllmd.architecture.weight_schemes import WeightSchemes
from lightllmd.architecture.weights import WeightSpec
from lightllmd.kernels.quantised import empty
from lightllmd.weights import place
from lightllmd.weights.arriving import source_bytes
from lightllmd.weights.gguf import GgufCheckpoint
from lightllmd.weights.gguf_schemes import stored_scheme
from lightllmd.weights.loaded import LoadedWeight, Progress, room


def stream(
    checkpoint: GgufCheckpoint,
    weights: Sequence[WeightSpec],
    schemes: WeightSchemes,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    passing: Sequence[WeightSpec] = (),
) -> Iterator[LoadedWeight]:
    """As `place.stream`; weights that `schemes` stores as the file does stay as they are."""
    total = sum(source_bytes(weight, checkpoint.tensors, {}) for weight in weights)
    done = 0

    def told(some: int, of: int) -> None:
        progress(done + some, total)

    def kept(weight: WeightSpec) -> Scheme | None:
        scheme = schemes.of(weight)
        return None if scheme.dense or scheme != stored_scheme(weight, checkpoint.tensors) else scheme

    for scheme, some in groupby(weights, kept):
        run = [*some]
        if scheme is None:
            dense = [weight for weight in passing if kept(weight) is None]
            yield from place.stream(checkpoint, run, dtype, device, told, dense)
        else:
            yield from _matrices(checkpoint, run, scheme, dtype, device, told)
        done += sum(source_bytes(weight, checkpoint.tensors, {}) for weight in run)


def _matrices(
    checkpoint: GgufCheckpoint,
    weights: Sequence[WeightSpec],
    scheme: Scheme,
    dtype: torch.dtype,
    device: torch.device,
    told: Progress,
) -> Iterator[LoadedWeight]:
    done = 0
    for weight in weights:
        shape = sum(part.shape[0] for part in weight.parts), weight.parts[0].shape[1]
        matrix = empty(scheme, shape, dtype, torch.device("cpu"))
        bias = room(weight.bias, dtype) if weight.bias else None
        row = 0
        for part in weight.parts:
            rows = itemgetter(slice(row, row := row + part.shape[0]))
            for count in checkpoint.read_matrix(part.name, matrix.by_rows(rows), part.cut):
                told(done := done + count, 0)
        row = 0
        for part in weight.bias:
            assert bias is not None
            for count in checkpoint.read(part.name, bias[row : (row := row + part.shape[0])], part.cut):
                told(done := done + count, 0)
        yield LoadedWeight(weight, matrix.to(device), None if bias is None else bias.to(device))
        del matrix, bias  # nothing is kept while the next is read
