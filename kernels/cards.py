"""What the choice of tiles knows of a GPU, read from it once."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Card:
    """`kind` names the class that tables of measured tiles are kept for; a card of no such class has tiles that are
    derived from its figures."""

    kind: str
    multiprocessors: int
    bandwidth: float  # bytes a second between memory and chip, as the data sheet has them
    cache: int  # bytes of the second-level cache
    shared: int  # bytes of shared memory that one program may have
    overlaps: bool  # has programmatic dependent launch: Hopper and later


# By the word in their names. The bandwidth tells apart what the multiprocessors don't.
H100 = Card("H100", 132, 3.35e12, 50 << 20, 227 << 10, True)
H200 = Card("H200", 132, 4.8e12, 50 << 20, 227 << 10, True)
KNOWN = {"H200": H200, "H100 80GB HBM3": H100}


@functools.cache
def card_of(device: torch.device) -> Card:
    """Of a GPU; of a CPU, where the interpreter runs, an H100."""
    if device.type != "cuda":
        return H100
    properties = torch.cuda.get_device_properties(device)
    kind = next((card.kind for word, card in KNOWN.items() if word in properties.name), "other")
    # DDR: two transfers a clock, which is in kHz.
    clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    return Card(
        kind,
        properties.multi_processor_count,
        2e3 * clock * width / 8,
        getattr(properties, "L2_cache_size", 0),
        getattr(properties, "shared_memory_per_block_optin", 99 << 10),
        (properties.major, properties.minor) >= (9, 0),
    )
