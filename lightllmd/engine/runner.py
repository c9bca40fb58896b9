"""Computes steps with torch's own operations on a CPU, one after another. Owns weights, KV cache, request->slot table
and sampling state."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import torch
from torch import Tensor

from lightllmd.config.bounds import LOGIT_ROWS, SPARE_WIDTH
from lightllmd.config.plan import Plan
from lightllmd.engine.batch import Row, Step, StepResult
from lightllmd.engine.loading import build_decoder, memory_errors, stored_weights
from lightllmd.engine.memory import MemoryMeter
from lightllmd.engine.sampler import Sampler
from lightllmd.engine.table import SlotTable
from lightllmd.kernels.dispatch import kernels_for
from lightllmd.models.decoder import Decoder

_CPU = torch.device("cpu")


class TorchRunner:
    """The `Runner` of a CPU. Nothing is read before `load` has set it."""

    overlaps = False
    slots: int
    decoder: Decoder
    caches: list[Tensor]  # per layer [slots, 2 * kv_heads, head_dim]
    table: SlotTable
    sampler: Sampler
    memory: MemoryMeter

    def load(self, plan: Plan, progress: Callable[[int, int], None]) -> None:
        """Raises WeightsInvalid, OutOfMemory, ConfigInvalid."""
        torch.set_num_threads(plan.config.engine.threads or plan.device.cpu_threads)
        self._plan = plan
        self._staged = False  # the weights stay when the rest goes
        self.slots = plan.max_total_token_num
        self.memory = MemoryMeter(_CPU)
        with memory_errors(), torch.inference_mode():
            self._read_weights(progress)
            self._make_room()

    def _read_weights(self, progress: Callable[[int, int], None]) -> None:
        dtype = getattr(torch, self._plan.data_type)
        weights = stored_weights(self._plan, _CPU, dtype, progress)
        self.decoder = build_decoder(self._plan, kernels_for(_CPU, dtype), weights, _CPU)

    def _make_room(self) -> None:
        """For all that steps leave behind."""
        plan, spec, params = self._plan, self.decoder.spec, self._plan.config.params
        dtype = getattr(torch, plan.data_type)
        shape = (self.slots, 2 * spec.kv_heads, spec.head_dim)
        self.caches = [torch.empty(shape, dtype=dtype) for _ in range(spec.layers)]
        rows, width = params.running_max_req_size + 1, params.max_req_total_len + SPARE_WIDTH
        self.table = SlotTable(rows, width, _CPU, dtype)
        self.sampler = Sampler(rows, width, spec.vocab, plan.eos_id, _CPU)
        self._newest = [0] * rows  # each table row's newest token
        self._result = StepResult([], [], [])
        self.memory.mark_loaded()

    def prepare(self, beat: Callable[[], None]) -> None:
        """Nothing is compiled here, and a step takes no memory before it runs."""

    # --- sleep ------------------------------------------------------------------------------------------------------
    def stage(self) -> None:
        """The weights are in host memory, so this only says that they are to stay there."""
        self._staged = True

    def unstage(self) -> None:
        self._staged = False

    def release(self, progress: Callable[[int, int], None]) -> None:
        del self.caches, self.table, self.sampler, self._newest, self._result
        if not self._staged:
            del self.decoder
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # smaller blocks come from the heap, which keeps what is free
        self.memory.mark_asleep()

    def restore(self, progress: Callable[[int, int], None]) -> None:
        with memory_errors(), torch.inference_mode():
            if not self._staged:
                self._read_weights(progress)
            self._make_room()
        self._staged = False

    # --- steps ------------------------------------------------------------------------------------------------------
    def launch(self, step: Step, beat: Callable[[], None]) -> None:
        """Raises OutOfMemory. A row whose logits are no numbers gets a log-probability that is none either."""
        with memory_errors(), torch.inference_mode():
            begun = self.memory.begin_step()
            rows = self._rows(step)
            for row in rows:
                if row.sampling is not None:
                    self.sampler.enter(row.table_row, row.sampling, row.branch)
            last, end = [], 0  # of each sampled row among the tokens
            for row in rows:
                end += len(row.tokens)
                if row.sample:
                    last.append(end - 1)
            wanted = torch.tensor(last) if 0 < len(last) < end else None
            hidden = self.decoder.forward(self.table.pack(rows, self.decoder.rope), self.caches, beat, wanted)
            self._result = self._sample([row for row in rows if row.sample], hidden, beat)
            self.memory.end_step(begun)

    def collect(self, beat: Callable[[], None]) -> StepResult:
        return self._result

    def run(self, step: Step, beat: Callable[[], None]) -> StepResult:
        """One step, launched and waited for."""
        self.launch(step, beat)
        return self.collect(beat)

    @torch.inference_mode()
    def every_logits(self, step: Step) -> Tensor:
        """Computes a step without sampling: fp32 logits ``[T, vocab]`` behind each of its tokens."""
        batch = self.table.pack(self._rows(step), self.decoder.rope)
        return self.decoder.head.logits(self.decoder.forward(batch, self.caches, lambda: None))

    def memory_stats(self) -> dict[str, float]:
        stats = self.memory.stats()
        if self._staged and self._plan.model is not None:
            stats["staged_bytes"] = stats["staged_total"] = float(self._plan.model.weight_bytes)
        return stats

    def _rows(self, step: Step) -> list[Row]:
        decode = step.decode
        going_on = zip(decode.table_rows, decode.starts, decode.slots, decode.positions, strict=True)
        return [
            Row(table_row, 0, 0, start, [self._newest[table_row]], [slot], True, position, None)
            for table_row, start, slot, position in going_on
        ] + step.rows

    def _sample(self, rows: list[Row], hidden: Tensor, beat: Callable[[], None]) -> StepResult:
        result = StepResult([], [], [])
        for first in range(0, len(rows), LOGIT_ROWS):
            some = rows[first : first + LOGIT_ROWS]
            logits = self.decoder.head.logits(hidden[first : first + LOGIT_ROWS])
            table_rows = [row.table_row for row in some]
            tokens, logprobs, alternatives = self.sampler.sample(logits, table_rows, [row.position for row in some])
            result.tokens += tokens.tolist()
            result.logprobs += logprobs.tolist()
            result.alternatives += alternatives
            beat()
        self.sampler.record([row.table_row for row in rows], result.tokens)
        for row, token in zip(rows, result.tokens, strict=True):
            self._newest[row.table_row] = token
        return result
