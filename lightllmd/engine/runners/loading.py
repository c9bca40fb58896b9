"""From a plan to a decoder with its weights on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from lightllmd.config.plan import ModelFacts, Plan
from lightllmd.config.stamps import require_unchanged
from lightllmd.errors import EngineError, OutOfMemory, WeightsInvalid
from lightllmd.kernels.dispatch import Kernels
from lightllmd.models.decoder import Decoder
from lightllmd.models.families import family_of
from lightllmd.weights import dummy, place
from lightllmd.weights.index import open_checkpoint
from lightllmd.weights.layout import Weight


def stored_weights(
    plan: Plan, device: torch.device, dtype: torch.dtype, progress: Callable[[int, int], None]
) -> Iterator[Weight]:
    """What the plan's checkpoint holds, checked as a whole before the first is yielded; random numbers of DUMMY. Its
    files are closed again at the end. Raises ModelChanged, WeightsInvalid, ConfigInvalid, OutOfMemory."""
    family = family_of(_model(plan).model_type)
    layout = family.layout(family.spec(_model(plan).hf_config))
    if plan.config.params.load_way == "DUMMY":
        return dummy.stream(layout, dtype, device, progress)
    checkpoint = open_checkpoint(_model(plan))
    layout.check(checkpoint.tensors, checkpoint.readable, _model(plan).path)
    return _of_these_files(place.stream(checkpoint, layout, dtype, device, progress), _model(plan))


def _of_these_files(weights: Iterator[Weight], model: ModelFacts) -> Iterator[Weight]:
    """Raises ModelChanged where the files became others while they were read, whatever that did to reading."""
    try:
        yield from weights
    except WeightsInvalid:
        require_unchanged(model.weight_stamps)
        raise
    require_unchanged(model.weight_stamps)


def build_decoder(plan: Plan, kernels: Kernels, weights: Iterable[Weight], device: torch.device) -> Decoder:
    return Decoder(family_of(_model(plan).model_type).spec(_model(plan).hf_config), kernels, weights, device)


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
