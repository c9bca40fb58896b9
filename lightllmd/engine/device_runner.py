"""Computes steps on a GPU. Everything that the next step needs stays on the device, so that a step is launched while
the one before it computes: the host sends a few numbers per row and reads the tokens a step later.

A decode step is a CUDA graph, of the smallest captured size that holds its rows; the rest are padding, which points at
a table row and a slot that belong to nobody. Steps with named tokens are launched operation by operation. Sampling is
launched behind the forward, apart from the graph.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from lightllmd.config.bounds import DEVICE_LOGIT_ROWS, SPARE_WIDTH, batch_sizes, graph_sizes
from lightllmd.config.plan import Plan
from lightllmd.engine.batch import DecodeRows, Step, StepResult
from lightllmd.engine.device_sampler import DeviceSampler
from lightllmd.engine.graphs import DecodeGraphs
from lightllmd.engine.loading import load_decoder, memory_errors
from lightllmd.engine.memory import MemoryMeter
from lightllmd.engine.staging import Download, Upload
from lightllmd.engine.table import rope_lengths
from lightllmd.engine.warmup import prefill_steps
from lightllmd.errors import NoUsableDevice
from lightllmd.kernels.dispatch import fused_kernels
from lightllmd.kernels.layout import PrefillTiles, TableBatch
from lightllmd.models.decoder import Decoder

# Numbers that a step uploads for each fed token and for each row, at most.
PER_TOKEN, PER_ROW, PER_TILE = 6, 12, 2


@dataclass
class _Out:
    """A step whose tokens are on their way to the host."""

    chunks: list[tuple[list[int], Download]]  # (table rows, tokens + log-probabilities + alternatives)


class DeviceRunner:
    """The `Runner` of a GPU. Nothing is read before `load` has set it. All launches come from one thread."""

    overlaps: bool
    slots: int
    decoder: Decoder
    caches: list[Tensor]  # per layer [slots + 1, 2 * kv_heads, head_dim]; the last slot is padding's
    memory: MemoryMeter

    def load(self, plan: Plan, progress: Callable[[int, int], None]) -> None:
        """Raises WeightsInvalid, OutOfMemory, NoUsableDevice, ConfigInvalid."""
        device, dtype = self._open(plan.device.kind), getattr(torch, plan.data_type)
        self._plan, self._device, params = plan, device, plan.config.params
        self.overlaps = plan.config.engine.overlap
        self._rows, width = params.running_max_req_size, params.max_req_total_len + SPARE_WIDTH
        self.slots = self._pad_slot = plan.max_total_token_num
        self._sizes = batch_sizes(self._rows)
        with memory_errors(), torch.inference_mode():
            self.memory = MemoryMeter(device)
            kernels = fused_kernels(device, dtype, plan.decode_kernel)
            self.decoder = load_decoder(plan, kernels, device, dtype, progress)
            spec, rope = self.decoder.spec, self.decoder.rope
            shape = (spec.layers, plan.max_total_token_num + 1, 2 * spec.kv_heads, spec.head_dim)
            self.caches = list(torch.empty(shape, dtype=dtype, device=device))
            for cache in self.caches:
                cache[-1] = 0
            self._table = torch.zeros((self._rows + 1, width), dtype=torch.int32, device=device)
            self._last = torch.zeros(self._rows + 1, dtype=torch.int32, device=device)
            self._sampler = DeviceSampler(self._rows + 1, spec.vocab, plan.eos_id, device)
            if not rope.by_length:
                self._cos_sin = rope.cos_sin(torch.arange(width, device=device))
            most = plan.batch_max_tokens + self._rows
            self._upload = Upload(PER_TOKEN * most + (PER_ROW + PER_TILE) * (self._rows + 1) + most, device)
            largest = self._sizes[-1]
            self._newest = torch.full((largest,), -1, dtype=torch.int32, device=device)
            self._counting = torch.arange(most + largest, dtype=torch.int32, device=device)
            self.memory.mark_loaded()
        self._graphs: DecodeGraphs | None = None
        self._out: deque[_Out] = deque()

    def prepare(self, beat: Callable[[], None]) -> None:
        """Captures the graphs, then runs the worst admissible steps beside them. Raises OutOfMemory."""
        captured = graph_sizes(self._plan.config) if self._device.type == "cuda" else []
        with memory_errors(), torch.inference_mode():
            if captured:
                self._graphs = DecodeGraphs()
            for size in reversed(self._sizes):
                self._pad(size)
                self._decode(size)
                if self._graphs is not None and size in captured:
                    self._graphs.capture(size, self._decode)
                beat()
            self.memory.mark_graphs()
            for step in prefill_steps(self._plan):
                self.run(step, beat)
            self.memory.mark_worst_steps()

    def launch(self, step: Step, beat: Callable[[], None]) -> None:
        """A row whose logits are no numbers gets a log-probability that is none either. Raises OutOfMemory."""
        with memory_errors(), torch.inference_mode():
            for row in step.rows:
                if row.sampling is not None:
                    self._sampler.enter(row.table_row, row.sampling, row.branch)
            self._sampler.flush()
            rows = [*step.decode.table_rows, *(row.table_row for row in step.rows if row.sample)]
            if step.rows:
                hidden, sampled, generated = self._mixed(step, beat)
            else:
                hidden, sampled, generated = self._go_on(step.decode)
            self._out.append(self._sample(rows, hidden, sampled, generated))

    def collect(self, beat: Callable[[], None]) -> StepResult:
        with memory_errors():
            result = StepResult([], [], [])
            for rows, download in self._out.popleft().chunks:
                tokens, logprobs, *alternatives = (tensor[: len(rows)].tolist() for tensor in download.wait(beat))
                result.tokens += tokens
                result.logprobs += logprobs
                result.alternatives += self._sampler.alternatives(rows, *alternatives)
            return result

    def run(self, step: Step, beat: Callable[[], None]) -> StepResult:
        """One step, launched and waited for."""
        self.launch(step, beat)
        return self.collect(beat)

    @torch.inference_mode()
    def every_logits(self, step: Step) -> Tensor:
        """Computes a step without sampling: fp32 logits ``[T, vocab]`` behind each of its tokens."""
        if step.rows:
            batch, _, _, _ = self._pack(step)
            hidden = self.decoder.forward(batch, self.caches, lambda: None)
        else:
            hidden = self._go_on(step.decode)[0][: step.size]
        return self.decoder.head.logits(hidden)

    def memory_stats(self) -> dict[str, float]:
        return self.memory.stats()

    # --- decode -------------------------------------------------------------------------------------------------
    def _go_on(self, rows: DecodeRows) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, table rows and generated positions of a step without named tokens, padded."""
        count = len(rows.table_rows)
        size = self._size(count)
        pad = size - count
        self._upload.begin()
        self._upload.put(rows.table_rows + [self._rows] * pad)
        self._upload.put(rows.starts + [0] * pad)
        self._upload.put(rows.slots + [self._pad_slot] * pad)
        self._upload.put(rows.positions + [0] * pad)
        table_rows, _, _, generated = self._upload.send()
        if self._graphs is not None and size in self._graphs:
            return self._graphs.replay(size), table_rows, generated
        return self._decode(size), table_rows, generated

    def _pad(self, size: int) -> None:
        """Uploads a step of nothing but padding."""
        self._upload.begin()
        for number in (self._rows, 0, self._pad_slot, 0):
            self._upload.put([number] * size)
        self._upload.send()

    def _decode(self, size: int) -> Tensor:
        """The forward of `size` rows, whose numbers are the beginning of the upload: the same launches every time."""
        table_rows, positions, slots, _ = self._upload.device[: 4 * size].view(4, size)
        angles, cos_sin = self._angles(positions, positions + 1 if self.decoder.rope.by_length else None)
        batch = TableBatch(
            tokens=self._newest[:size],
            rows=table_rows,
            positions=positions,
            slots=slots,
            decode=size,
            prefill=None,
            angles=angles,
            cos_sin=cos_sin,
            table=self._table,
            last=self._last,
        )
        return self.decoder.forward(batch, self.caches, _nothing)

    def _size(self, count: int) -> int:
        """The smallest padded size of `count` rows."""
        return self._sizes[bisect_left(self._sizes, count)]

    def _angles(self, positions: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """(row of cos_sin per token, cos_sin)"""
        if lengths is None:
            return positions, self._cos_sin
        return self._counting[: len(positions)], self.decoder.rope.cos_sin(positions, lengths)

    # --- named tokens -------------------------------------------------------------------------------------------
    def _mixed(self, step: Step, beat: Callable[[], None]) -> tuple[Tensor, Tensor, Tensor]:
        """As `_go_on`, for a step that has rows; the hidden states are those of the sampled tokens."""
        batch, at, table_rows, generated = self._pack(step)
        return self.decoder.forward(batch, self.caches, beat).index_select(0, at), table_rows, generated

    def _pack(self, step: Step) -> tuple[TableBatch, Tensor, Tensor, Tensor]:
        """(the step on the device; of the sampled rows, padded: index among the tokens, table row, position)"""
        decode, rows = step.decode, step.rows
        going_on = len(decode.table_rows)
        counts = [len(row.tokens) for row in rows]
        ends = [going_on + int(end) for end in np.cumsum(counts)]
        firsts = [going_on, *ends[:-1]]
        sampled = [(end - 1, row) for end, row in zip(ends, rows, strict=True) if row.sample]
        pad = self._size(going_on + len(sampled)) - going_on - len(sampled)
        tiles = self._tiles(counts, [row.start for row in rows])
        by_length = self.decoder.rope.by_length
        put = self._upload.put
        self._upload.begin()
        put([-1] * going_on + [token for row in rows for token in row.tokens])
        put(np.concatenate([decode.table_rows, np.repeat([row.table_row for row in rows], counts)]))
        put(np.concatenate([decode.starts, *(np.arange(row.start, row.start + len(row.tokens)) for row in rows)]))
        put(decode.slots + [slot for row in rows for slot in row.slots])
        put([start + 1 for start in decode.starts] + list(chain(*map(rope_lengths, rows))) if by_length else [])
        put([*range(going_on), *(at for at, _ in sampled)] + [0] * pad)
        put(decode.table_rows + [row.table_row for _, row in sampled] + [self._rows] * pad)
        put(decode.positions + [row.position for _, row in sampled] + [0] * pad)
        put(np.asarray(tiles).reshape(-1))
        put([row.table_row for row in rows])
        put(firsts)
        put(counts)
        put([row.start for row in rows])
        tokens, token_rows, positions, slots, lengths, at, table_rows, generated, *named = self._upload.send()
        angles, cos_sin = self._angles(positions, lengths if by_length else None)
        batch = TableBatch(
            tokens=tokens,
            rows=token_rows,
            positions=positions,
            slots=slots,
            decode=going_on,
            prefill=PrefillTiles(named[0].view(-1, 2), *named[1:]),
            angles=angles,
            cos_sin=cos_sin,
            table=self._table,
            last=self._last,
        )
        return batch, at, table_rows, generated

    def _tiles(self, counts: list[int], starts: list[int]) -> list[tuple[int, int]]:
        from lightllmd.kernels.prefill_attention import tiles_for  # here: Triton is imported once a device is open

        spec = self.decoder.spec
        return tiles_for(counts, starts, spec.heads // spec.kv_heads)

    # --- sampling -----------------------------------------------------------------------------------------------
    def _sample(self, rows: list[int], hidden: Tensor, table_rows: Tensor, generated: Tensor) -> _Out:
        """`rows` are the table rows that count; the tensors are padded."""
        chunks = []
        for first in range(0, len(rows), DEVICE_LOGIT_ROWS):
            part = slice(first, first + DEVICE_LOGIT_ROWS)
            logits = self.decoder.head.logits(hidden[part])
            drawn = self._sampler.sample(logits, rows[part], table_rows[part], generated[part], self._last)
            chunks.append((rows[part], Download(drawn)))
        return _Out(chunks)

    def _open(self, kind: str) -> torch.device:
        """A GPU; a CPU is taken where Triton interprets its kernels, which tests do."""
        if kind == "cuda" and not torch.cuda.is_available():
            raise NoUsableDevice("no CUDA device can be used by this build of torch")
        return torch.device(kind)


def _nothing() -> None:
    pass
