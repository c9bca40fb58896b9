"""What the ranks of a model have of it, in words."""

from __future__ import annotations

from lightllmd.architecture.family import Architecture
from lightllmd.architecture.ranks import Rank, architecture_of_rank, vocabulary_of
from lightllmd.architecture.weight_schemes import WeightSchemes


def shares(architecture: Architecture, schemes: WeightSchemes, count: int) -> str:
    """Of the first layer, and the vocabulary."""
    whole = architecture.spec.layers[0]
    ranks = [architecture_of_rank(architecture, schemes, Rank(index, count)).spec.layers[0] for index in range(count)]
    kv_heads = [rank.attention.kv_heads for rank in ranks]
    repeated = ", which several ranks hold alike" if sum(kv_heads) > whole.attention.kv_heads else ""
    rows, _ = vocabulary_of(architecture.spec.vocab, Rank(0, count))
    return ", ".join(
        [
            f"each rank has {_each([rank.attention.heads for rank in ranks])} of {whole.attention.heads} query heads",
            f"{_each(kv_heads)} of {whole.attention.kv_heads} KV heads{repeated}",
            f"{_each([rank.feed_forward.intermediate for rank in ranks])} of {whole.feed_forward.intermediate} "
            "elements of an MLP",
            f"{rows} of {architecture.spec.vocab} rows of the vocabulary",
        ]
    )


def _each(numbers: list[int]) -> str:
    """One number where all are alike, else the extremes."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
