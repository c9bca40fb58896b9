"""What the ranks of a model have of it, in words."""

from __future__ import annotations

from lightllmd.architecture.family import Architecture
from lightllmd.architecture.ranks import Rank, heads_of, intermediate_of, vocabulary_of
from lightllmd.architecture.weight_schemes import WeightSchemes


def shares(architecture: Architecture, schemes: WeightSchemes, count: int) -> str:
    """Of the first layer, and the vocabulary."""
    spec, ranks = architecture.spec, [Rank(index, count) for index in range(count)]
    attention, size = spec.layers[0].attention, spec.layers[0].feed_forward.intermediate
    group = next(schemes.of(weight).group for weight in architecture.weights if weight.role == "down")
    heads = [heads_of(attention, rank) for rank in ranks]
    kv_heads = [_length(each.kv) for each in heads]
    repeated = ", which several ranks hold alike" if sum(kv_heads) > attention.kv_heads else ""
    inner = [_length(intermediate_of(size, group, rank)) for rank in ranks]
    rows, _ = vocabulary_of(spec.vocab, ranks[0])
    return ", ".join(
        [
            f"each rank has {_each([_length(each.query) for each in heads])} of {attention.heads} query heads",
            f"{_each(kv_heads)} of {attention.kv_heads} KV heads{repeated}",
            f"{_each(inner)} of {size} elements of an MLP",
            f"{rows} of {spec.vocab} rows of the vocabulary",
        ]
    )


def _length(run: tuple[int, int]) -> int:
    return run[1] - run[0]


def _each(numbers: list[int]) -> str:
    """One number where all are alike, else the extremes."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
