"""Attention of Triton kernels and cuDNN, for rows read through the request->slot table.

Nothing here waits for the device or asks it for a length, so a decode step can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightllmd.kernels import whole_prompts
from lightllmd.kernels.decode_attention import decode_attention, segments_for
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import Batch, Heads, PrefillTiles, TableRows
from lightllmd.kernels.prefill_attention import prefill_attention
from lightllmd.kernels.rope_kv import rope_kv
from lightllmd.kernels.segments import partial_results
from lightllmd.kernels.split_prefill import split_prefill

# Of segments that have been read, one per row and head: more than rows that are split have.
COUNTERS = 1 << 16


class FusedAttention:
    """`decode_kernel` is one of the documented mode names, or "auto" for what is fastest for a shape."""

    def __init__(self, device: torch.device, decode_kernel: str = "auto") -> None:
        self._arrived = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self._packed = decode_kernel != "triton_flashdecoding"
        self._split = decode_kernel != "triton_gqa_attention"

    def __call__(
        self,
        qkv: Tensor,
        cache: LayerCache,
        batch: Batch[TableRows],
        heads: Heads,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        qkv = qkv.view(-1, heads.query + 2 * heads.kv, heads.dim)
        read, slots = batch.metadata, batch.slots
        angles = read.cos_sin[:, heads.rotary * heads.dim : (heads.rotary + 1) * heads.dim]
        norms = q_norm, k_norm, heads.norm_eps, heads.norm_offset
        rope_kv(qkv, angles, read.angles, slots, cache, heads.query, heads.kv, *norms)
        q, table_rows, positions = qkv[:, : heads.query], batch.rows, batch.positions
        rows = read.prefill
        causal = rows is None or rows.bidirectional is None
        if wanted is not None and causal:
            # All that they see is in the cache by now, so each is read as a decode row is.
            q, table_rows, positions = (tensor.index_select(0, wanted) for tensor in (q, table_rows, positions))
            out = torch.empty_like(q)
            self._decode(q, cache, heads, read.table, table_rows, positions, out)
            return out.flatten(1)
        out = qkv.new_empty(q.shape)
        if ahead := read.decode:
            self._decode(q[:ahead], cache, heads, read.table, table_rows[:ahead], positions[:ahead], out[:ahead])
        if rows is not None:
            for span in rows.whole:
                attended = whole_prompts.attend(qkv, heads, span)
                if len(attended) == len(out):
                    return attended.flatten(1)
                out[span.first : span.first + len(attended)] = attended
            if len(rows.tiles):
                self._prefill(q[ahead:], cache, heads, read.table, rows, out[ahead:])
        return out.flatten(1) if wanted is None else out.flatten(1).index_select(0, wanted)

    def _decode(
        self, q: Tensor, cache: LayerCache, heads: Heads, table: Tensor, rows: Tensor, positions: Tensor, out: Tensor
    ) -> None:
        """Attention of single tokens, each over what its row holds up to it."""
        width = min(table.shape[1], heads.window or table.shape[1])
        segments = segments_for(len(q), heads.kv, width) if self._split else 1
        partial = partial_results(out, segments, self._arrived if len(q) * heads.query <= COUNTERS else None)
        where = (table, rows, positions)
        decode_attention(q, cache, heads, *where, out, partial, segments=segments, packed=self._packed)

    def _prefill(
        self, q: Tensor, cache: LayerCache, heads: Heads, table: Tensor, rows: PrefillTiles, out: Tensor
    ) -> None:
        """Attention of the rows' tokens that lie in tiles."""
        partial = partial_results(out, rows.segments, self._arrived)
        if partial is None:
            prefill_attention(q, cache, heads, table, rows, out)
        else:
            split_prefill(q, cache, heads, table, rows, out, partial)
