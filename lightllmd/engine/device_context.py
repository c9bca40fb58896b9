"""What a device's driver sets up for each process that uses it, some tenths of a second: made before it is needed."""

from __future__ import annotations

import torch

from lightllmd.errors import SystemFailure


def make_context(device: str) -> None:
    """Leaves nothing on the device beside the context. Raises SystemFailure.

    The process is no use after that: driver and torch may remember the failure, and find no device later on.
    """
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(torch.device(device).index or 0)  # or one on the first GPU is made as well
        torch.empty(1, device=device)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # the block that the tensor was in
    except (RuntimeError, AssertionError) as refused:  # the latter from a torch without CUDA
        raise SystemFailure(f"can't make a context on {device}: {refused}") from refused
