"""What the card itself would need: bytes over its bandwidth, arithmetic over its matmul rate. Seconds.

A decode step reads the weights (without the embedding table, of which it needs a row per token) and the keys and
values of every row; a prefill multiplies every token with every weight, the head's only once per row, and attends
causally. Nothing is taken to overlap, except that a prefill can't be faster than its weights are read.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Any

from lightllmd.architecture.families import architecture_of


@dataclass(frozen=True)
class Card:
    """Measured ceilings of one card."""

    name: str
    bandwidth: float  # bytes per second, read and written, of a large copy
    arithmetic: float  # FLOP per second of an 8192^3 matmul in 16 bits


# H100 80GB HBM3 (SXM) and H200, random data.
KNOWN = {"H100": (2.97e12, 794e12), "H200": (4.12e12, 779e12)}


def card_of(device: str, name: str, dtype: str) -> Card | None:
    """The card's ceilings, measured where they aren't known; None where a percentage would mean nothing (a CPU)."""
    if device != "cuda":
        return None
    for part, (bandwidth, arithmetic) in KNOWN.items():
        if part in name and dtype != "float32":
            return Card(name, bandwidth, arithmetic)
    return measure(name, dtype)


def measure(name: str, dtype: str) -> Card:
    """A copy of 2 GB and an 8192^3 matmul, best of five."""
    import torch

    def best(work: Any) -> float:
        times = []
        for _ in range(6):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return min(times[1:])

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / best(lambda: target.copy_(source))
    left, right = (torch.randn(8192, 8192, device="cuda").to(getattr(torch, dtype)) for _ in range(2))
    arithmetic = 2 * 8192**3 / best(lambda: left @ right)
    return Card(name, bandwidth, arithmetic)


@dataclass(frozen=True)
class Roofline:
    """One model on one card."""

    card: Card
    layers: int
    weights: int  # elements of all layers' matrices
    head: int  # elements of the head
    heads_width: int  # query heads x head_dim
    kv_width: int  # key heads x head_dim
    item: int  # bytes of an element, of weights and cache alike

    @classmethod
    def of(cls, config: dict[str, Any], item: int, card: Card) -> Roofline:
        """`config`: config.json of a decoder whose layers are alike."""
        architecture = architecture_of(config["model_type"], config)
        spec, attention = architecture.spec, architecture.spec.layers[0].attention
        matrices = [part for weight in architecture.weights if weight.quantisable for part in weight.parts]
        return cls(
            card=card,
            layers=len(spec.layers),
            weights=sum(math.prod(part.shape) for part in matrices),
            head=spec.hidden * spec.vocab,
            heads_width=attention.q_size,
            kv_width=attention.kv_size,
            item=item,
        )

    @property
    def step(self) -> float:
        """Reading all weights once."""
        return (self.weights + self.head) * self.item / self.card.bandwidth

    def cache(self, tokens: float) -> float:
        """Reading the keys and values of so many tokens."""
        return tokens * 2 * self.layers * self.kv_width * self.item / self.card.bandwidth

    def arithmetic(self, tokens: int) -> float:
        """A prompt's products and its causal attention."""
        products = 2 * (self.weights * tokens + self.head)
        attention = 2 * tokens * tokens * self.heads_width * self.layers
        return (products + attention) / self.card.arithmetic

    def decode(self, batch: int, context: float) -> float:
        """One step at that mean context."""
        return self.step + self.cache(batch * context)

    def prefill(self, prompts: list[int]) -> float:
        return max(sum(self.arithmetic(tokens) for tokens in prompts), self.step)

    def mix(self, lengths: list[tuple[int, int]], rows: int) -> float:
        """Requests of (prompt, new) tokens, at most `rows` at a time: as many steps as the fullest row has tokens."""
        steps = 0
        ends: list[int] = []
        for _, new in lengths:
            begin = heapq.heappop(ends) if len(ends) == rows else 0
            heapq.heappush(ends, begin + new)
            steps = max(steps, begin + new)
        read = sum(prompt * new + new * (new + 1) / 2 for prompt, new in lengths)
        return steps * self.step + self.cache(read) + sum(self.arithmetic(prompt) for prompt, _ in lengths)
