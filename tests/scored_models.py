"""Tiny random models with each head that scores, transformers' own vectors of them, and an engine that is asked."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from lightllmd.architecture.families import architecture_of
from lightllmd.config.plan import Plan, Scoring
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.scheduling.admission import SchedulerLimits
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.engine.step import Runner, Step
from lightllmd.ipc.messages import PoolingParams, Submit
from tiny_models import BASE, VARIANTS, plan_for, write_tensors

MARKER = 100  # of steps
QWEN2 = VARIANTS["qwen2"]
INTERNLM2 = {"architectures": ["InternLM2ForRewardModel"], "model_type": "internlm2", "bias": False}

HEADS: dict[str, dict[str, Any]] = {
    "llama, one label": {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}},
    "llama, three labels": {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "bad", "1": "fair", "2": "good"},
        "label2id": {"bad": 0, "fair": 1, "good": 2},
        "tie_word_embeddings": True,
    },
    "qwen2, two labels unnamed": {**QWEN2, "architectures": ["Qwen2ForSequenceClassification"]},
    "qwen3": {
        **VARIANTS["qwen3"],
        "architectures": ["Qwen3ForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
    },
    "gemma2": {
        **VARIANTS["gemma2"],
        "architectures": ["Gemma2ForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
    },
    "internlm2 reward": INTERNLM2,
    "internlm2 reward, biases": {**INTERNLM2, "bias": True, "num_key_value_heads": 1},
    "qwen2 reward": {**QWEN2, "architectures": ["Qwen2ForRewardModel"]},
    "qwen2 process reward": {**QWEN2, "architectures": ["Qwen2ForProcessRewardModel"]},
}


def write_scored(folder: Path, changes: dict[str, Any], seed: int = 0) -> Path:
    """A Hugging Face directory."""
    config = BASE | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)

    def drawn(shape: tuple[int, ...], neutral: float) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        return noise * 1.5 / shape[1] ** 0.5 if len(shape) > 1 else noise * 0.1 + neutral

    weights = architecture_of(config["model_type"], config).weights
    tensors = {part.name: drawn(part.shape, weight.neutral) for weight in weights for part in weight.parts}
    tensors |= {part.name: drawn(part.shape, 0.0) for weight in weights for part in weight.bias}
    write_tensors(folder, tensors)
    return folder


def scored_plan(folder: Path, **options: Any) -> Plan:
    """As resolution would make it, but for the token of steps, which needs a tokenizer."""
    plan = plan_for(folder, use_reward_model=True, **options)
    scored = architecture_of(plan.model.model_type, plan.model.hf_config).scored
    scoring = Scoring(list(scored.labels), scored.problem_type, MARKER if scored.steps else None)
    return msgspec.structs.replace(plan, scoring=scoring)


class Truth:
    """What transformers computes in fp32, one prompt after the other."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file
        from transformers import AutoModel, AutoModelForSequenceClassification, LlamaConfig, LlamaModel

        config = json.loads((folder / "config.json").read_bytes())
        stored = load_file(folder / "model.safetensors")
        how = {"dtype": torch.float32, "attn_implementation": "eager"}
        self.steps = "Process" in config["architectures"][0]
        if config["architectures"][0].endswith("ForSequenceClassification"):
            whole = AutoModelForSequenceClassification.from_pretrained(folder, **how).eval()
            self.model, self.head = whole.model, whole.score
            self.whole = whole
            return
        if config["model_type"] == "internlm2":
            llama = LlamaConfig(**config | {"model_type": "llama", "attention_bias": config["bias"]}, **how)
            self.model = LlamaModel(llama).eval()
            self.model.load_state_dict(as_llama(stored, config), strict=True)
            self.head = nn.Linear(config["hidden_size"], 1, bias=False)
            self.head.load_state_dict({"weight": stored["v_head.weight"]})
            return
        self.model = AutoModel.from_pretrained(folder, **how).eval()
        size = config["hidden_size"]
        self.head = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 1 + self.steps))
        named = {name.removeprefix("score."): value for name, value in stored.items() if name.startswith("score.")}
        self.head.load_state_dict(named)

    @torch.inference_mode()
    def vectors(self, prompt: list[int]) -> list[list[float]]:
        """At each place that the model is read at."""
        values = self.head(self.model(torch.tensor([prompt])).last_hidden_state[0])
        places = [at for at, token in enumerate(prompt) if token == MARKER] if self.steps else [len(prompt) - 1]
        return values[places].tolist()


def as_llama(stored: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """InternLM2's tensors under the names of transformers' LlamaModel, queries, keys and values apart."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim, shared = config["hidden_size"] // heads, heads // kv_heads
    names = {
        "tok_embeddings": "embed_tokens",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }
    found = {}
    for name, value in stored.items():
        if not name.startswith("model."):
            continue
        name = name.removeprefix("model.")
        if "wqkv" in name:
            kinds: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
            for at, head in enumerate(value.split(dim)):
                kind = "q" if at % (shared + 2) < shared else "k" if at % (shared + 2) == shared else "v"
                kinds[kind].append(head)
            for kind, parts in kinds.items():
                found[name.replace("attention.wqkv", f"self_attn.{kind}_proj")] = torch.cat(parts)
            continue
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        found[name] = value
    return found


class Engine:
    """A scheduler and a loaded runner; `steps` are those since the last `ask`."""

    def __init__(self, plan: Plan, runner: Runner) -> None:
        self.plan, self.runner = plan, runner
        self.scheduler = Scheduler(SchedulerLimits.of(plan), 1)
        self.loop = StepLoop(self.scheduler, runner, lambda step: self.steps.append(step))
        self.steps: list[Step] = []
        self._asked = 0

    def ask(self, prompts: Sequence[list[int]], **fields: Any) -> list[list[list[float]]]:
        """The vectors of each prompt; all are asked at once."""
        self.steps = []
        marker = self.plan.scoring.marker
        numbers = []
        for prompt in prompts:
            self._asked += 1
            numbers.append(self._asked)
            at = None if marker is None else [index for index, token in enumerate(prompt) if token == marker]
            submit = Submit(self._asked, 0, 1, self._asked, prompt, PoolingParams(at), [0], [[]], **fields)
            assert self.scheduler.submit(submit) is None
        got: dict[int, list[list[float]]] = {}
        while self.loop.busy:
            for output in self.loop.turn(lambda: None).values():
                for one in output.pooled:
                    got[one.request] = [array("f", vector).tolist() for vector in one.vectors]
        self.scheduler.check()
        return [got[number] for number in numbers]
