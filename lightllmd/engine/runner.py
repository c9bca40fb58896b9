"""Computes steps with torch, on a CPU or a GPU. Owns weights, KV cache, request->slot table and sampling state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightllmd.config.budget import LOGIT_ROWS, SPARE_WIDTH
from lightllmd.config.plan import ModelFacts, Plan
from lightllmd.engine.batch import Row, Step, StepResult
from lightllmd.engine.memory import MemoryMeter
from lightllmd.engine.sampler import Sampler
from lightllmd.engine.table import SlotTable
from lightllmd.errors import EngineError, NoUsableDevice, OutOfMemory
from lightllmd.kernels.dispatch import kernels_for
from lightllmd.models.decoder import Decoder
from lightllmd.models.families import family_of
from lightllmd.weights import place
from lightllmd.weights.index import open_checkpoint


class TorchRunner:
    """The `Runner` of the torch back end. Nothing is read before `load` has set it."""

    decoder: Decoder
    caches: list[Tensor]  # per layer [slots, 2 * kv_heads, head_dim]
    table: SlotTable
    sampler: Sampler
    memory: MemoryMeter

    def load(self, plan: Plan, progress: Callable[[int, int], None]) -> None:
        """Raises WeightsInvalid, OutOfMemory, NoUsableDevice, ConfigInvalid."""
        if plan.model is None:
            raise EngineError("the plan names no model")
        torch.set_num_threads(plan.config.engine.threads or plan.device.cpu_threads)
        device, dtype = _device(plan.device.kind), getattr(torch, plan.data_type)
        with _memory_errors(), torch.inference_mode():
            self.memory = MemoryMeter(device)
            self.decoder = _decoder(plan.model, device, dtype, progress)
            spec = self.decoder.spec
            shape = (plan.max_total_token_num, 2 * spec.kv_heads, spec.head_dim)
            self.caches = [torch.empty(shape, dtype=dtype, device=device) for _ in range(spec.layers)]
            params = plan.config.params
            rows, width = params.running_max_req_size + 1, params.max_req_total_len + SPARE_WIDTH
            self.table = SlotTable(rows, width, device, dtype)
            self.sampler = Sampler(rows, width, spec.vocab, plan.eos_id, device)
            self.memory.mark_loaded()

    def run(self, step: Step, beat: Callable[[], None]) -> StepResult:
        """Raises OutOfMemory. A row whose logits are no numbers gets a log-probability that is none either."""
        with _memory_errors(), torch.inference_mode():
            begun = self.memory.begin_step()
            for row in step.rows:
                if row.sampling is not None:
                    self.sampler.enter(row.table_row, row.sampling, row.branch)
            packed = self.table.pack(step, self.decoder.rope)
            hidden = self.decoder.forward(packed, self.caches, beat)
            result = self._sample([row for row in step.rows if row.sample], hidden, beat)
            self.memory.end_step(begun)
            return result

    def memory_stats(self) -> dict[str, float]:
        return self.memory.stats()

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
        return result


def _decoder(
    model: ModelFacts, device: torch.device, dtype: torch.dtype, progress: Callable[[int, int], None]
) -> Decoder:
    """Reads the checkpoint; its files are closed again on return."""
    family = family_of(model.model_type)
    spec = family.spec(model.hf_config)
    layout = family.layout(spec)
    checkpoint = open_checkpoint(model)
    place.check(checkpoint, layout)
    weights = place.stream(checkpoint, layout, dtype, device, progress)
    return Decoder(spec, kernels_for(device, dtype), weights, device, dtype)


def _device(kind: str) -> torch.device:
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise NoUsableDevice("no CUDA device can be used by this build of torch")
        # cuDNN's attention plans anew for every length, and every decode step has a new one: 70 ms a token where the
        # other kernels take 9 (SmolLM2 in fp16 on an H100).
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(kind)


@contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemory(str(error)) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):  # torch has no class of its own for host memory
            raise OutOfMemory(str(error).splitlines()[0]) from error
        raise
