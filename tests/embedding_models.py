"""Tiny random models as embedding checkpoints are stored, and transformers' own last hidden states of them."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightllmd.architecture.prefixes import UNPREFIXED
from lightllmd.config.plan import Plan, Pooling, PromptEmbedding
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.scheduling.admission import SchedulerLimits
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.engine.step import Runner, Step
from lightllmd.ipc.messages import PoolingParams, Submit
from tiny_models import plan_for

MODULE = "sentence_transformers.models."


def as_base_model(folder: Path) -> Path:
    """As `AutoModel.save_pretrained` stores it: without head, under the names that the decoder has by itself."""
    path = folder / "model.safetensors"
    stored = load_file(path)
    stored.pop("lm_head.weight", None)
    save_file({name.removeprefix("model."): value for name, value in stored.items()}, path)
    config = json.loads((folder / "config.json").read_bytes())
    config["architectures"] = [config["architectures"][0].replace("ForCausalLM", "Model")]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_modules(folder: Path, pooling: dict[str, Any], *, normalised: bool, others: Sequence[str] = ()) -> Path:
    """sentence-transformers' settings beside it."""
    names = ["Transformer", "Pooling", *others, *(["Normalize"] if normalised else [])]
    modules = [
        {"idx": index, "name": str(index), "path": f"{index}_{name}" if index else "", "type": f"{MODULE}{name}"}
        for index, name in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def prompts() -> list[list[int]]:
    """Of different lengths; the first two have a prefix in common."""
    drawn = random.Random(5)
    made = [drawn.choices(range(3, 99), k=length) for length in (61, 47, 1, 2, 33, 90)]
    made[1][:40] = made[0][:40]
    return made


class Truth:
    """What transformers computes in fp32, one prompt after the other."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel

        self._model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    @torch.inference_mode()
    def vector(self, prompt: list[int], params: PoolingParams) -> Tensor:
        states = self._model(torch.tensor([prompt])).last_hidden_state[0].double()
        vector = states.mean(0) if params.mean else states[0 if params.at == [0] else -1]
        vector = vector[: params.size or None]
        return (vector / vector.norm() if params.unit else vector).float()


def embedding_plan(folder: Path, *, base: bool = False, **options: Any) -> Plan:
    """As resolution would make it; `base`: of what `as_base_model` wrote."""
    plan = plan_for(folder, **options)
    embedding = PromptEmbedding(Pooling("last", unit=True), 64)
    model = msgspec.structs.replace(plan.model, headless=base, prefixes=UNPREFIXED if base else None)
    return msgspec.structs.replace(plan, embedding=embedding, model=model)


class Engine:
    """A scheduler and a loaded runner; `steps` are those since the last `ask`."""

    def __init__(self, plan: Plan, runner: Runner) -> None:
        self.scheduler = Scheduler(SchedulerLimits.of(plan), 1)
        self.loop = StepLoop(self.scheduler, runner, lambda step: self.steps.append(step))
        self.steps: list[Step] = []
        self.tokens: list[int] = []  # of a stream beside
        self._asked = 0
        self._vectors: dict[int, Tensor] = {}

    def turn(self) -> None:
        """Of the step loop."""
        for output in self.loop.turn(lambda: None).values():
            self.tokens += [token for token, number in zip(output.tokens, output.requests, strict=True) if number]
            for one in output.pooled:
                if one.request:
                    (vector,) = one.vectors
                    self._vectors[one.request] = torch.tensor(array("f", vector).tolist())

    def ask(self, prompts: Sequence[list[int]], params: PoolingParams, **fields: Any) -> list[Tensor]:
        """The vector of each prompt; all are asked at once."""
        self.steps = []
        numbers = range(self._asked + 1, self._asked + 1 + len(prompts))
        self._asked = numbers[-1]
        for number, prompt in zip(numbers, prompts, strict=True):
            assert self.scheduler.submit(Submit(number, 0, 1, number, prompt, params, [0], [[]], **fields)) is None
        while not self._vectors.keys() >= {*numbers}:
            self.turn()
        self.scheduler.check()
        return [self._vectors[number] for number in numbers]
