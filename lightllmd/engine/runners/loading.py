"""From a plan to a decoder with its weights on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from lightllmd.architecture.families import architecture_of
from lightllmd.architecture.family import Architecture
from lightllmd.config.plan import ModelFacts, Plan
from lightllmd.config.stamps import require_unchanged
from lightllmd.errors import EngineError, OutOfMemory, WeightsInvalid
from lightllmd.kernels.dispatch import Kernels
from lightllmd.models.decoder import Decoder
from lightllmd.weights import dummy, place
from lightllmd.weights.index import open_checkpoint
from lightllmd.weights.loaded import LoadedWeight
from lightllmd.weights.verify import verify


def stored_weights(
    plan: Plan, device: torch.device, dtype: torch.dtype, progress: Callable[[int, int], None]
) -> Iterator[LoadedWeight]:
    """What the plan's checkpoint holds, checked as a whole before the first is yielded; random numbers of DUMMY. Its
    files are closed again at the end. Raises ModelChanged, WeightsInvalid, ConfigInvalid, OutOfMemory."""
    architecture = _architecture(plan)
    if plan.config.params.load_way == "DUMMY":
        return dummy.stream(architecture.weights, dtype, device, progress)
    checkpoint = open_checkpoint(_model(plan))
    verify(architecture, checkpoint.tensors, checkpoint.readable, _model(plan).path)
    return _of_these_files(place.stream(checkpoint, architecture.weights, dtype, device, progress), _model(plan))


def _of_these_files(weights: Iterator[LoadedWeight], model: ModelFacts) -> Iterator[LoadedWeight]:
    """Raises ModelChanged where the files became others while they were read, whatever that did to reading."""
    try:
        yield from weights
    except WeightsInvalid:
        require_unchanged(model.weight_stamps)
        raise
    require_unchanged(model.weight_stamps)


def build_decoder(plan: Plan, kernels: Kernels, weights: Iterable[LoadedWeight], device: torch.device) -> Decoder:
    """Takes over what `weights` yields. Raises ConfigInvalid."""
    return Decoder(_architecture(plan).spec, kernels, weights, device)


def _architecture(plan: Plan) -> Architecture:
    return architecture_of(_model(plan).model_type, _model(plan).hf_config)


def _model(plan: Plan) -> ModelFacts:
    if plan.model is None:
        raise EngineError("the plan names no model")
    return plan.model


@contextmanager
def memory_errors() -> Iterator[None]:
    """Memory that does not suffice becomes OutOfMemory, whatever torch calls it."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemory(str(error)) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):  # torch has no class of its own for host memory
            raise OutOfMemory(str(error).splitlines()[0]) from error
        raise
