"""Tiny random models on disk, the plan to run them, and a driver that feeds a runner by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightllmd.architecture.families import architecture_of
from lightllmd.architecture.vision import text_config
from lightllmd.architecture.weight_schemes import ALL_DENSE, WeightSchemes
from lightllmd.config.parameters import Config, EngineSettings, Params
from lightllmd.config.plan import Budget, DeviceFacts, ModelFacts, Plan
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.runners.gpu import GpuRunner
from lightllmd.engine.step import Row, SamplingRow, Step, no_decode
from lightllmd.ipc.messages import SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all heads have keys": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "odd vocabulary": {"vocab_size": 131},
    "head_dim given": {"head_dim": 32},
    "three heads": {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1},
    "gelu": {"hidden_act": "gelu"},
    "rope linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "rope dynamic": {"max_position_embeddings": 24, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "rope llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "rope in the words of transformers 5": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"},
    "gemma2": {  # prompts of the tests are longer than the window, logits and scores near their caps
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "num_hidden_layers": 4,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "sliding_window": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "gemma3": {  # both kinds of layers, each with rotary positions of its own
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "rope_theta": 1000.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "tie_word_embeddings": True,
    },
}
IN_GRIDS = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
UNLIKE_LLAMA = (
    "gemma2",
    "gemma3_text",
    "internlm2",
    "olmo2",
    *IN_GRIDS,
)  # their tensors are those of the list of weights


def tensors_of(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights under their Hugging Face names, scaled so that logits spread over a few units."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * 1.5 / columns**0.5

    def vector(size: int, mean: float = 0.0) -> Tensor:
        return torch.randn(size, generator=generator) * 0.1 + mean

    if config["model_type"] in UNLIKE_LLAMA:
        listed = architecture_of(config["model_type"], config).weights
        return {
            part.name: matrix(*part.shape) if len(part.shape) > 1 else vector(*part.shape, weight.neutral)
            for weight in listed
            for part in weight.stored
        }
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    tensors = {"model.embed_tokens.weight": torch.randn(vocab, hidden, generator=generator)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
        mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        for room, products, biased in (("self_attn", attention, "attention_bias"), ("mlp", mlp, "mlp_bias")):
            for name, shape in products.items():
                tensors[f"{prefix}{room}.{name}.weight"] = matrix(*shape)
                if config[biased] or (config["model_type"] == "qwen2" and name in ("q_proj", "k_proj", "v_proj")):
                    tensors[f"{prefix}{room}.{name}.bias"] = vector(shape[0])
        if config["model_type"] == "qwen3":
            tensors[f"{prefix}self_attn.q_norm.weight"] = vector(head_dim, 1.0)
            tensors[f"{prefix}self_attn.k_norm.weight"] = vector(head_dim, 1.0)
        tensors[f"{prefix}input_layernorm.weight"] = vector(hidden, 1.0)
        tensors[f"{prefix}post_attention_layernorm.weight"] = vector(hidden, 1.0)
    tensors["model.norm.weight"] = vector(hidden, 1.0)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(vocab, hidden)
    return tensors


def write_model(folder: Path, changes: dict[str, Any] | None = None, shards: int = 1, seed: int = 0) -> Path:
    """A Hugging Face directory with config.json and one or more safetensors files."""
    config = {**BASE, **(changes or {})}
    config = {key: value for key, value in config.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder, tensors_of(config, seed), shards)
    return folder


def write_tensors(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def plan_for(
    model: Path,
    *,
    dtype: str = "float32",
    slots: int = 512,
    device: str = "cpu",
    threads: int = 1,
    schemes: WeightSchemes = ALL_DENSE,
    kv_scheme: str = "dense",
    **params: Any,
) -> Plan:
    """A plan as resolution would make it, for a Hugging Face directory, one of Megatron-DeepSpeed's or a .gguf file.

    One thread: what is this small gains nothing from a second, and loses much where cores are busy.
    """
    from lightllmd.weights.deepspeed import deepspeed_files
    from lightllmd.weights.gguf_header import gguf_hf_config, read_gguf_header
    from lightllmd.weights.headers import safetensors_files

    if model.suffix == ".gguf":
        config, files, form = gguf_hf_config(read_gguf_header(model)), [str(model)], "gguf"
    elif any(model.glob("layer*.pt")):
        config = json.loads((model / "config.json").read_bytes())
        parts = deepspeed_files(model, architecture_of(config["model_type"], config))
        files, form = [str(part) for part in parts], "deepspeed"
    else:
        config = json.loads((model / "config.json").read_bytes())
        files, form = [str(file) for file in safetensors_files(model)], "safetensors"
    facts = ModelFacts(
        path=str(model),
        format=form,
        model_type=config["model_type"],
        hf_config=config,
        files=files,
        weight_elements=0,
        weight_bytes=0,
        checkpoint_dtype=None,
        context_length=config.get("max_position_embeddings"),
        eos_ids=[2],
        has_tokenizer=False,
        has_chat_template=False,
    )
    limits = {"max_req_input_len": 255, "max_req_total_len": 256, "running_max_req_size": 16, **params}
    return Plan(
        config=Config(params=Params(**limits), engine=EngineSettings(threads=threads)),
        model=facts,
        device=DeviceFacts(device, device, 1, 0, 0, ["float32", "bfloat16"], 2),
        derived=[],
        budget=Budget([], 0),
        max_total_token_num=slots,
        batch_max_tokens=max(256, limits["max_req_total_len"]),
        eos_id=[2],
        data_type=dtype,
        tokenizer_mode="fast",
        log_stats_interval=10.0,
        vocab_size=text_config(config)["vocab_size"],
        model_name="tiny",
        schemes=schemes,
        kv_scheme=kv_scheme,
    )


def load(model: Path, **options: Any) -> CpuRunner:
    runner = CpuRunner()
    runner.load(plan_for(model, **options), lambda done, total: None)
    return runner


def load_on_device(model: Path, **options: Any) -> GpuRunner:
    """The runner of GPUs: on one, or on the CPU with Triton's interpreter."""
    runner = GpuRunner()
    runner.load(plan_for(model, **{"device": DEVICE, "slots": 255, **options}), lambda done, total: None)
    return runner


def transformers_model(folder: Path) -> Any:
    """The truth: transformers in fp32 with its eager attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


class Driver:
    """Feeds a runner one step at a time and returns logits; hands out slots itself, scattered if asked."""

    @torch.inference_mode()
    def __init__(
        self, runner: CpuRunner | GpuRunner, *, scattered: bool = False, poisoned: bool = False, seed: int = 0
    ) -> None:
        self.runner = runner
        self.free = list(range(runner.slots))
        if scattered:
            random.Random(seed).shuffle(self.free)
        if poisoned:
            for cache in runner.caches:
                cache.entries.fill_(float("nan"))
        self.slots: dict[int, list[int]] = {}  # table row -> its slots
        self.steps = 0

    def row(
        self,
        number: int,
        tokens: list[int],
        position: int = 0,
        *,
        sample: bool = True,
        params: SamplingParams | None = None,
        emitted: list[int] | None = None,
        prompt_ids: list[int] | None = None,
        prompt_length: int = 0,
    ) -> Row:
        """The next tokens of table row `number`; it enters if it holds nothing."""
        held = self.slots.setdefault(number, [])
        start = len(held)
        taken = [self.free.pop(0) for _ in tokens]
        held += taken
        entry = SamplingRow(params or SamplingParams(), prompt_ids or [], emitted or []) if start == 0 else None
        return Row(number, number, 0, start, list(tokens), taken, sample, position, entry, prompt_length)

    def release(self, number: int) -> None:
        self.free += self.slots.pop(number)

    @torch.inference_mode()
    def logits(self, *rows: Row) -> list[Tensor]:
        """One step; the logits after every fed token, ``[len(tokens), vocab]`` per row."""
        logits = self.runner.every_logits(self.step(*rows))
        return list(logits.split([len(row.tokens) for row in rows]))

    def step(self, *rows: Row) -> Step:
        self.steps += 1
        kind = "decode" if all(row.start for row in rows) else "prefill"
        return Step(self.steps, kind, no_decode(), list(rows), [])
