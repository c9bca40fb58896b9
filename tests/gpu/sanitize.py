"""Launches every kernel once or twice on small ragged shapes, to be run under a memory checker:

``PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitize.py``

Without torch's cache every tensor is an allocation of its own, so that an access past its end is seen. Run it with
`--warm` before, outside the checker: then the kernels are compiled, and the checker sees launches alone. What rows do
not own is NaN, and no result may be. Prints "done" when all has been launched and waited for.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from lightllmd.engine.sampling.gpu_sampler import DeviceSampler
from lightllmd.engine.step import SamplingRow
from lightllmd.ipc.messages import SamplingParams
from lightllmd.kernels import split_prefill
from lightllmd.kernels.activation import gated, soft_cap_
from lightllmd.kernels.decode_attention import decode_attention
from lightllmd.kernels.embed import embed, gather_rows
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import Heads, PrefillTiles
from lightllmd.kernels.linear import Norm
from lightllmd.kernels.norm import rms_norm
from lightllmd.kernels.prefill_attention import pairs_per_tile, prefill_attention, tiles_for
from lightllmd.kernels.rope_kv import rope_kv
from lightllmd.kernels.segments import Partial
from lightllmd.kernels.skinny import linear
from lightllmd.kernels.tiles import Tile

# Triton's interpreter has no bf16.
DEVICE, NARROW = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float16)
EPS = 1e-5


def numbers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Made on the host: the checker has fewer launches to watch."""
    return torch.randn(shape).to(dtype).to(DEVICE)


def nothing_yet(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype).to(DEVICE)


def check(*results: Tensor) -> None:
    for result in results:
        assert result.cpu().isfinite().all()


# Attention of every kind: window and cap.
KINDS: list[dict[str, Any]] = [{}, {"window": 40, "soft_cap": 5.0}]


def paged(lengths: list[int], kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[LayerCache, Tensor]:
    """A cache whose slots are NaN unless a row owns them, and a table as wide as the longest row."""
    total, width = sum(lengths), max(lengths)
    order = torch.randperm(total + 5)
    cache, table = torch.full((total + 5, 2 * kv_heads, dim), float("nan")), torch.zeros(len(lengths), width)
    first = 0
    for row, length in enumerate(lengths):
        slots = order[first : first + length]
        cache[slots] = torch.randn(length, 2 * kv_heads, dim)
        table[row, :length] = slots.float()
        first += length
    return LayerCache(cache.to(dtype).to(DEVICE)), table.int().to(DEVICE)


def partial_results(lines: int, segments: int, dim: int, arrived: Tensor | None) -> Partial:
    values = nothing_yet(lines, segments, dim, dtype=torch.float32)
    return Partial(values, nothing_yet(lines, segments, dtype=torch.float32), arrived)


def first_and_last(dtype: torch.dtype) -> None:
    embedding, table = normal(50, 100, dtype=dtype), numbers([0] * 4 * 9).view(4, 9)
    out, last = nothing_yet(3, 100, dtype=dtype), numbers([7, 49, 0, 3])
    places = numbers([1, 0, 3]), numbers([8, 0, 8]), numbers([5, 6, 7])
    for scale in (None, 7.5):
        embed(numbers([-1, 0, 49]), *places, last, table, embedding, out, scale)
    assert table.cpu()[[1, 0, 3], [8, 0, 8]].tolist() == [5, 6, 7]
    picked = nothing_yet(2, 100, dtype=dtype)
    gather_rows(out, numbers([2, 0]), picked)
    check(out, picked)


def norms(dtype: torch.dtype) -> None:
    x, residual, weight = normal(3, 100, dtype=dtype), normal(3, 100, dtype=dtype), normal(100, dtype=dtype)
    out = nothing_yet(3, 100, dtype=dtype)
    rms_norm(x, Norm(weight, EPS), out)
    rms_norm(x, Norm(weight, EPS, offset=1.0), residual, residual)
    check(out, residual)


def rotation(dtype: torch.dtype, dim: int) -> None:
    weight, cos_sin = normal(dim, dtype=dtype), normal(9, dim)
    for heads, kv_heads, norm in ((9, 3, None), (4, 1, weight)):
        qkv, cache = normal(3, heads + 2 * kv_heads, dim, dtype=dtype), nothing_yet(7, 2 * kv_heads, dim, dtype=dtype)
        where = numbers([8, 0, 3]), numbers([6, 0, 2])
        rope_kv(qkv, cos_sin, *where, LayerCache(cache), heads, kv_heads, norm, norm, EPS)
        check(qkv, cache.cpu()[[6, 0, 2]])


def activations(dtype: torch.dtype) -> None:
    for name, columns in (("silu", 1030), ("gelu", 30), ("gelu_tanh", 30), ("relu", 30)):
        out = nothing_yet(2, columns, dtype=dtype)
        gated(normal(2, 2 * columns, dtype=dtype), name, out)
        check(out)
    check(soft_cap_(normal(3, 1030), 30.0))


def decode(dtype: torch.dtype, dim: int) -> None:
    lengths = [0, 1, 63, 64, 65, 200, 0]
    for heads, kv_heads, packed in ((9, 3, True), (4, 2, False)):
        cache, table = paged(lengths, kv_heads, dim, dtype)
        q = normal(len(lengths), heads + 2 * kv_heads, dim, dtype=dtype)[:, :heads]
        rows, positions = numbers([*range(len(lengths))]), numbers([length - 1 for length in lengths])
        for kind, (segments, merged) in itertools.product(KINDS, ((1, True), (4, True), (4, False))):
            out = nothing_yet(len(lengths), heads, dim, dtype=dtype)
            arrived = numbers([0] * len(lengths) * heads) if merged else None
            partial = partial_results(len(lengths) * heads, segments, dim, arrived) if segments > 1 else None
            shape = Heads(heads, kv_heads, dim, dim**-0.5, EPS, **kind)
            given = q, cache, shape, table, rows, positions, out, partial
            decode_attention(*given, segments=segments, packed=packed)
            check(out)
            assert arrived is None or not arrived.cpu().any()


def prefill(dtype: torch.dtype, dim: int) -> None:
    """Few pairs, then many: they have tiles of their own."""
    few, many = ([1, 5, 0, 70, 1, 33], [0, 0, 0, 0, 64, 130]), ([257, 1], [3, 0])
    for (counts, starts), heads, kv_heads in ((few, 9, 3), (many, 16, 1)):
        tokens, group = sum(counts), heads // kv_heads
        lengths = [count + start for count, start in zip(counts, starts, strict=True)]
        cache, table = paged(lengths, kv_heads, dim, dtype)
        q = normal(tokens, heads + 2 * kv_heads, dim, dtype=dtype)[:, :heads]
        firsts = [0, *itertools.accumulate(counts)][:-1]
        where = [numbers([*range(len(counts))]), *(numbers(values) for values in (firsts, counts, starts))]
        for kind, segments in itertools.product(KINDS, (1, 2, 8)):
            pairs = pairs_per_tile(tokens, group) if segments == 1 else split_prefill.PAIRS
            tiles = torch.from_numpy(tiles_for(counts, starts, group, pairs))
            number = numbers([len(tiles)])
            if segments > 1:
                tiles = torch.cat([tiles, torch.zeros(3, 2, dtype=torch.int32)])
            out = nothing_yet(tokens, heads, dim, dtype=dtype)
            rows = PrefillTiles(tiles.to(DEVICE), number, *where, pairs, segments, [])
            given = q, cache, Heads(heads, kv_heads, dim, dim**-0.5, EPS, **kind), table, rows, out
            arrived = numbers([0] * len(tiles) * split_prefill.PAIRS * kv_heads)
            if segments == 1:
                prefill_attention(*given)
            else:
                split_prefill.split_prefill(*given, partial_results(tokens * heads, segments, dim, arrived))
            check(out)
            assert not arrived.cpu().any()


def products(dtype: torch.dtype) -> None:
    """By the rules' tiles, then by small ones, which leave ragged ends everywhere."""
    small = [Tile(True, 4, 64, 4, 1), Tile(False, 16, 64, 4, 3)]
    for (rows, n, k), tile in itertools.product([(1, 38, 200), (2, 38, 200), (19, 38, 200)], [None, *small]):
        if tile is not None and tile.gemv and rows > 8:
            continue
        x, weight = normal(rows, k, dtype=dtype), normal(n, k, dtype=dtype)
        bias = normal(n, dtype=dtype)
        norm = Norm(normal(k, dtype=dtype), EPS, 1.0) if rows == 1 and (tile is None or tile.gemv) else None
        added, narrow = normal(rows, n, dtype=dtype), nothing_yet(rows, n // 2, dtype=dtype)
        wide = nothing_yet(rows, n, dtype=torch.float32)
        more: dict[str, Any] = {"norm": norm, "tile": tile}
        linear(x, weight, added, bias=bias, residual=added, **more)
        linear(x, weight, narrow, bias=bias, activation="silu", pdl=DEVICE == "cuda", **more)
        linear(x, weight, wide, **more)
        check(added, narrow, wide)


def sampling() -> None:
    """Plain rows alone, then with others of every kind, then under a mask."""
    vocab = 3001
    kinds = [
        SamplingParams(),
        SamplingParams(do_sample=True, temperature=0.7, seed=1),
        SamplingParams(do_sample=True, top_p=0.5, top_k=7, seed=2),
        SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, input_penalty=True, top_logprobs=20),
        SamplingParams(min_new_tokens=4, exponential_decay_length_penalty=(1, 1.5)),
        SamplingParams(candidates=64, top_logprobs=3, presence_penalty=0.5),
        SamplingParams(do_sample=True, min_p=0.1, logit_bias={7: 2.0}, seed=3),
        SamplingParams(do_sample=True, typical_p=0.4, presence_penalty=0.5, seed=4),
    ]
    sampler = DeviceSampler(len(kinds) + 1, vocab, [2, 5], torch.device(DEVICE))
    for row, params in enumerate(kinds):
        sampler.enter(row, SamplingRow(params, [1, vocab - 1, 1], [4]), 0)
    sampler.flush()
    last = numbers([0] * (len(kinds) + 1))
    everything = [*range(len(kinds))]
    for chosen, masked in (([0], False), (everything[:-1], False), (everything, False), (everything, True)):
        padded = [*chosen, len(kinds)]  # a row that never entered
        rows, generated = numbers(padded), numbers([2] * len(padded))
        for row in chosen if masked else []:
            sampler.restrict(row, b"\x55" * 4 * 94)
        sampler.flush()
        tokens, logprobs, *_ = sampler.sample(normal(len(padded), vocab), chosen, rows, generated, last)
        check(logprobs)
        assert all(0 <= token < vocab and not (masked and token % 2) for token in tokens[: len(chosen)].tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description="launches every kernel, for a memory checker")
    parser.add_argument("--warm", action="store_true", help="only compiles, which launching once does: no checker")
    parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        for dtype in (NARROW, torch.float32):
            first_and_last(dtype)
            norms(dtype)
            activations(dtype)
            for dim in (64, 128):
                rotation(dtype, dim)
                decode(dtype, dim)
                prefill(dtype, dim)
        products(NARROW)
        sampling()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
