"""From a checkpoint to the decoder's tensors: checked as a whole, then streamed one by one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightllmd.errors import WeightsInvalid
from lightllmd.weights import staged
from lightllmd.weights.index import Checkpoint
from lightllmd.weights.layout import Layout, Part, Progress, Weight
from lightllmd.weights.safetensors import SafetensorsCheckpoint


def check(checkpoint: Checkpoint, layout: Layout) -> None:
    """Every tensor there, with its shape, and no other. Raises WeightsInvalid naming the tensor."""
    wanted = {part.name: part for target in layout.targets for part in target.parts + target.bias}
    missing = [part for part in wanted.values() if part.name not in checkpoint.tensors]
    if missing:
        raise WeightsInvalid(_missing(missing))
    for part in wanted.values():
        found = checkpoint.tensors[part.name].shape
        if tuple(found) != part.shape:
            raise WeightsInvalid(f"tensor {part.name} has shape {list(found)}, the config says {list(part.shape)}")
    extra = [name for name in checkpoint.tensors if name not in wanted and not layout.ignored.fullmatch(name)]
    if extra:
        shape = list(checkpoint.tensors[extra[0]].shape)
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise WeightsInvalid(
            f"tensor {extra[0]} {shape}{more} is in the checkpoint, but the config has no place for it"
        )


def _missing(parts: list[Part]) -> str:
    more = f" (and {len(parts) - 1} more)" if len(parts) > 1 else ""
    return f"tensor {parts[0].name}{more} is missing; expected shape {list(parts[0].shape)}"


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
