"""How weights of 4 and 8 bits lie on a GPU: in the order in which the threads of a tile of tensor cores want them.

A block is 16 rows by 64 inputs, and its bytes lie side by side (512 of 4 bits, 1024 of 8), so that 16-byte loads of a
warp are whole lines of memory. Blocks follow each other along the inputs, then along the rows; the last blocks along
the rows have as many rows as there are left. No byte is added: the storage is what the scheme says.

In a row of a block of 4 bits, the 16-bit word c holds the inputs c, 16 + c, 32 + c and 48 + c, from the lowest bits on.
Two neighbouring words are one register, out of which ``(register >> 4 j) & 0x000f000f | magic`` makes two 16-bit floats
of the inputs 16 j + c and 16 j + c + 1: one or two instructions for two weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightllmd.architecture.gpu_storage import BLOCK_INPUTS

BLOCK_ROWS = 16
CHUNK = 1024  # rows that are packed at a time, which bounds the memory beside values and result


def packs(columns: int) -> bool:
    """Whether a weight of so many inputs is whole blocks."""
    return columns % BLOCK_INPUTS == 0


def pack(values: Tensor, bits: int) -> Tensor:
    """``[N, K]`` of one value an element (0 to 15 in uint8, or any of 8 bits) -> flat storage: int16 words of N * K / 4
    of 4 bits, the values' dtype of 8."""
    rows, columns = values.shape
    assert packs(columns)
    words = 16 if bits == 4 else BLOCK_INPUTS
    out = torch.empty(rows * columns // BLOCK_INPUTS * words, device=values.device, dtype=_word(values, bits))
    for first in range(0, rows, CHUNK):
        part = values[first : first + CHUNK].unflatten(1, (-1, BLOCK_INPUTS))
        if bits == 4:
            part = _nibbles(part)
        whole = len(part) // BLOCK_ROWS * BLOCK_ROWS
        into = out[first * columns // BLOCK_INPUTS * words :][: part.numel()]
        cut = part[:whole].numel()
        into[:cut].view(-1, columns // BLOCK_INPUTS, BLOCK_ROWS, words).copy_(
            part[:whole].unflatten(0, (-1, BLOCK_ROWS)).transpose(1, 2)
        )
        into[cut:].view(columns // BLOCK_INPUTS, -1, words).copy_(part[whole:].transpose(0, 1))
    return out


def unpack(packed: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """``[N, K]`` values, one an element, from what `pack` made."""
    words = 16 if bits == 4 else BLOCK_INPUTS
    whole = rows // BLOCK_ROWS * BLOCK_ROWS
    cut = whole * columns // BLOCK_INPUTS * words
    above = packed[:cut].view(-1, columns // BLOCK_INPUTS, BLOCK_ROWS, words).transpose(1, 2).flatten(0, 1)
    parts = [above]
    if rows > whole:
        parts.append(packed[cut:].view(columns // BLOCK_INPUTS, -1, words).transpose(0, 1))
    blocks = torch.cat(parts)
    if bits == 4:
        wide = blocks.to(torch.int32)
        blocks = torch.stack([wide >> shift & 15 for shift in (0, 4, 8, 12)], 2).flatten(2).to(torch.uint8)
    return blocks.flatten(1)


def _word(values: Tensor, bits: int) -> torch.dtype:
    return torch.int16 if bits == 4 else values.dtype


def _nibbles(blocks: Tensor) -> Tensor:
    """uint8 ``[N, K / 64, 64]`` -> int16 ``[N, K / 64, 16]``."""
    planes = blocks.unflatten(2, (4, 16))
    pairs = torch.stack([planes[:, :, 0] | planes[:, :, 1] << 4, planes[:, :, 2] | planes[:, :, 3] << 4], 3)
    return pairs.view(torch.int16).squeeze(3)
