"""Attention of a block of a prompt behind a long past, as a padded step beside rows that go on has it: by tiles, and by
how many segments their keys are cut into. Every call reads another layer's keys and values."""

from __future__ import annotations

import math
from functools import partial as bound

import torch
from cases.attention import gathered_attention, heads_of, random_cache
from cases.products import DTYPE, SHAPES, Shape
from cases.timing import Report, copies_for, median_us, require_close
from torch import Tensor

from lightllmd.config.bounds import PREFILL_ROWS
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import PrefillTiles
from lightllmd.kernels.prefill_attention import TileShape, prefill_attention, tiles_for
from lightllmd.kernels.segments import partial_results
from lightllmd.kernels.split_prefill import segments_for, split_prefill

TOKENS, PASTS = 224, (0, 2048, 4096, 8192)
# Tiles, and segments of their keys; 0: not by the kernel that splits.
SMALL, LARGE = TileShape(64, 64, 4, 5), TileShape(128, 128, 8, 5)
CANDIDATES = (
    *((SMALL, segments) for segments in (0, 1, 2, 4)),
    *((LARGE, segments) for segments in (0, 1, 2, 4)),
    *((TileShape(128, 64, 8, 5), segments) for segments in (1, 2, 4)),
    *((TileShape(128, 64, 4, 5), segments) for segments in (2, 4)),
)


def measure(name: str, report: Report) -> None:
    """Ends with a table of microseconds: candidates by the tokens that lie behind."""
    shape = SHAPES[name]
    rule = segments_for(TOKENS, shape.heads // shape.kv_heads, shape.kv_heads, max(PASTS) + TOKENS)
    found: dict[tuple[TileShape, int], list[str]] = {candidate: [] for candidate in CANDIDATES}
    for past in PASTS:
        block = Block(shape, past)
        for tile, segments in CANDIDATES:
            us = math.nan
            with report.case(f"split {past} {tuple(tile)} {segments}"):
                us = block.timed(tile, segments)
                report.result("split", tokens=TOKENS, past=past, tiles=tuple(tile), segments=segments, us=us)
            found[tile, segments].append(f"{us:9.1f}")
        del block
        torch.cuda.empty_cache()
    print(f"us of {TOKENS} tokens behind      ", *(f"{past:9}" for past in PASTS))
    for (tile, segments), times in found.items():
        how = f"in {segments}" if segments else "unsplit"
        print(f"{'x'.join(map(str, tile)):16} {how:8}", *times, " <- the rule" * ((tile, segments) == (LARGE, rule)))


class Block:
    """One row's tokens behind `past` others, in the first of as many rows as a padded step has."""

    def __init__(self, shape: Shape, past: int) -> None:
        device, keys = torch.device("cuda"), past + TOKENS
        heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.head_dim
        self._group, self._kv_heads, self._past, self._heads = heads // kv_heads, kv_heads, past, heads_of(shape)
        self._caches = [random_cache(keys + 1, shape) for _ in range(copies_for(4 * keys * kv_heads * dim, most=32))]
        self._table = torch.randperm(keys, device=device).to(torch.int32).view(1, keys)
        qkv = torch.randn(TOKENS, heads + 2 * kv_heads, dim, device=device, dtype=DTYPE)
        self._q = qkv[:, :heads]
        empty = [0] * PREFILL_ROWS
        numbers = ([0, *empty], [0, *empty], [TOKENS, *empty], [past, *empty])
        self._where = [torch.tensor(values, dtype=torch.int32, device=device) for values in numbers]
        self._truth = self._expected(self._caches[0])

    def _expected(self, cache: LayerCache) -> Tensor:
        """By torch, which masks by the last keys of a square: each 32nd token, over what it sees."""
        return torch.cat(
            [
                gathered_attention(self._q[token : token + 1], cache, self._table[0, : self._past + token + 1], False)
                for token in range(0, TOKENS, 32)
            ]
        )

    def timed(self, tile: TileShape, segments: int) -> float:
        """Microseconds. Raises ValueError where the result is wrong."""
        q, (_, heads, dim), pairs = self._q, self._q.shape, tile.block_m
        tiles = torch.from_numpy(tiles_for([TOKENS], [self._past], self._group, pairs))
        number = torch.tensor([len(tiles)], dtype=torch.int32, device=q.device)
        most = TOKENS * self._group // pairs + PREFILL_ROWS + 1
        padding = torch.tensor([[PREFILL_ROWS, 0]] * (most - len(tiles)), dtype=torch.int32)
        tiles = torch.cat([tiles, padding]).to(q.device)
        out = torch.full((TOKENS, heads, dim), float("nan"), device=q.device, dtype=DTYPE)
        # One segment is never merged: what it would be merged from is not read.
        arrived = torch.zeros(most * self._kv_heads, dtype=torch.int32, device=q.device)
        partial = partial_results(out, max(2, segments), arrived)
        rows = PrefillTiles(tiles, number, *self._where, pairs, segments, [])

        def call(cache: LayerCache) -> None:
            given = (q, cache, self._heads, self._table, rows, out)
            if not segments:
                prefill_attention(*given, shape=tile)
            else:
                split_prefill(*given, partial, shape=tile)

        call(self._caches[0])
        require_close(out[::32], self._truth, 1e-2)
        if not out.isfinite().all():
            raise ValueError("wrong result: something is not finite")
        turns = max(len(self._caches), 8)
        return median_us([bound(call, self._caches[turn % len(self._caches)]) for turn in range(turns)])
