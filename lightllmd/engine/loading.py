"""From a plan to a decoder with its weights on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lightllmd.config.plan import Plan
from lightllmd.errors import EngineError, OutOfMemory
from lightllmd.kernels.dispatch import Kernels
from lightllmd.models.decoder import Decoder
from lightllmd.models.families import family_of
from lightllmd.weights import dummy, place
from lightllmd.weights.index import open_checkpoint


def load_decoder(
    plan: Plan, kernels: Kernels, device: torch.device, dtype: torch.dtype, progress: Callable[[int, int], None]
) -> Decoder:
    """Reads the checkpoint; its files are closed again on return. Raises WeightsInvalid, OutOfMemory."""
    if plan.model is None:
        raise EngineError("the plan names no model")
    family = family_of(plan.model.model_type)
    spec = family.spec(plan.model.hf_config)
    layout = family.layout(spec)
    if plan.config.params.load_way == "DUMMY":
        return Decoder(spec, kernels, dummy.stream(layout, dtype, device, progress), device)
    checkpoint = open_checkpoint(plan.model)
    place.check(checkpoint, layout)
    return Decoder(spec, kernels, place.stream(checkpoint, layout, dtype, device, progress), device)


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
