"""The documented LightLLM API-server parameters, and the whole configuration: the one declaration of every setting.

`page_default` is the documented page's value where ours differs: those four are "auto", with the page's value as what
auto falls back to. Our own tables are in tables.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from lightllmd.config.images import ImagesSettings
from lightllmd.config.keys import KeyRing
from lightllmd.config.modes import GROUPS, IN_WORDS
from lightllmd.config.setting import Setting
from lightllmd.config.tables import (
    EngineSettings,
    FakeSettings,
    HttpSettings,
    LogSettings,
    QuantiseSettings,
    SupervisorSettings,
)

__all__ = [
    "Config",
    "EngineSettings",
    "FakeSettings",
    "HttpSettings",
    "ImagesSettings",
    "LogSettings",
    "Params",
    "SupervisorSettings",
]

SERVING = "Serving"
MODEL = "Model"
CAPACITY = "Capacity and lengths"
SCHEDULING = "Scheduling"
MODES = "Modes of generation"
IMAGES = "Images"
STATISTICS = "Statistics and metrics"

DATA_TYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}  # aliases of data_type
_COUNT = 2**31 - 1  # slots and tokens are indexed with 32 bits


class Params(msgspec.Struct, frozen=True, kw_only=True):
    """The 40 documented LightLLM API-server parameters, and a table of ours that belongs to a model as they do."""

    host: Annotated[
        str,
        Setting(
            doc="Address that the HTTP server listens on: an IP address or a host name. 127.0.0.1 is reachable from "
            "this machine only; 0.0.0.0 and :: listen on every interface (then set [http] api_keys_file too).",
            group=SERVING,
            filled=True,
            pattern=r"[A-Za-z0-9._:%-]+",
            form="an IP address or a host name, without scheme and port",
            reload="front end",
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        Setting(
            doc="TCP port of the HTTP server. 0 takes any free one; lightllmctl status shows which.",
            group=SERVING,
            minimum=0,
            maximum=65535,
            reload="front end",
        ),
    ] = 8000
    model_dir: Annotated[
        str | None,
        Setting(
            doc="The model: a directory in Hugging Face layout (config.json, tokenizer, *.safetensors), a .gguf file, "
            "a directory that holds exactly one .gguf file, or package:NAME for a model inside an installed Python "
            "package, which is found without importing it.",
            group=MODEL,
            filled=True,
            example='"/srv/models/llama-3.1-8b-instruct"',
        ),
    ] = None
    tokenizer_mode: Annotated[
        Literal["auto", "slow", "fast"],
        Setting(
            doc="Which tokenizer implementation reads and writes text. fast is tokenizer.json in the tokenizers "
            "library; slow is the sentencepiece library on tokenizer.model, exact to the last space, and the fast one "
            "where the model has no such file; auto is the fast one, converted from tokenizer.model where need be.",
            group=MODEL,
            page_default="slow",
        ),
    ] = "auto"
    load_way: Annotated[
        Literal["HF", "DS", "DUMMY"],
        Setting(
            doc="Layout of the weight files. HF: Hugging Face names in safetensors or GGUF files. DS: "
            "Megatron-DeepSpeed pipeline checkpoints of models with Llama's tensor names, "
            "layer_NN-model_MM-model_states.pt beside config.json and tokenizer. DUMMY: random weights of the shapes "
            "that config.json says, with no weight files; without tokenizer files the text is token ids in decimal.",
            group=MODEL,
        ),
    ] = "HF"
    max_total_token_num: Annotated[
        int | Literal["auto"],
        Setting(
            doc="Size of the KV cache: how many tokens, of all running requests together, it holds. auto takes "
            "what the device's free memory holds after the weights and the worst step; 6000 where nothing can "
            "be measured.",
            group=CAPACITY,
            unit="tokens",
            minimum=2,
            maximum=_COUNT,
            page_default=6000,
        ),
    ] = "auto"
    batch_max_tokens: Annotated[
        int | None,
        Setting(
            doc="Most prompt tokens that one step may hold, over all requests; a step's working memory grows with it. "
            "What a paused request had generated counts as prompt. At least max_req_total_len or, with splitfuse_mode, "
            "splitfuse_block_size. Unset: the larger of that and max_total_token_num / 6, or 8192 where that is auto.",
            group=CAPACITY,
            unit="tokens",
            minimum=1,
            maximum=_COUNT,
            example="8192",
        ),
    ] = None
    eos_id: Annotated[
        list[int] | Literal["auto"],
        Setting(
            doc="Token ids that end a generation. auto takes them from generation_config.json, config.json or the GGUF "
            "metadata and adds the chat template's end of turn; [2] where the model names none.",
            group=MODEL,
            unit="token ids",
            minimum=0,
            maximum=_COUNT,
            filled=True,
            page_default=[2],
        ),
    ] = "auto"
    running_max_req_size: Annotated[
        int,
        Setting(
            doc="Most sequences that are admitted at a time, running and paused; a request with n = 4 counts as four.",
            group=CAPACITY,
            unit="sequences",
            minimum=1,
            maximum=65536,
        ),
    ] = 1000
    tp: Annotated[
        int,
        Setting(
            doc="Tensor parallelism: over how many devices the model is split, a process (rank) on each: heads, the "
            "MLP and the vocabulary are cut, so that each device holds and reads its part of the weights and of the KV "
            "cache. The devices are the first ones that CUDA_VISIBLE_DEVICES leaves, tp for each of [engine] replicas; "
            "on a CPU the ranks share its cores and memory.",
            group=MODEL,
            unit="devices",
            minimum=1,
            maximum=1024,
        ),
    ] = 1
    max_req_input_len: Annotated[
        int,
        Setting(
            doc="Most prompt tokens of one request, special tokens counted; less than max_req_total_len. What is "
            "longer is refused or, with long_truncation_mode, cut.",
            group=CAPACITY,
            unit="tokens",
            minimum=1,
            maximum=_COUNT,
        ),
    ] = 2048
    max_req_total_len: Annotated[
        int,
        Setting(
            doc="Most tokens of one request, prompt and max_new_tokens together. At most the model's context and, when "
            "that is a number, max_total_token_num.",
            group=CAPACITY,
            unit="tokens",
            minimum=2,
            maximum=_COUNT,
        ),
    ] = 3072
    nccl_port: Annotated[
        int,
        Setting(
            doc="TCP port of 127.0.0.1 where the ranks of a tensor-parallel model find each other; the n-th of "
            "[engine] replicas takes the n-th port from it on. Where a port is taken, any free one is used, and the "
            "log says so. Unused with tp = 1.",
            group=SERVING,
            minimum=1,
            maximum=65535,
        ),
    ] = 28765
    mode: Annotated[
        list[str],
        Setting(
            doc="How the KV cache and the weights are stored and read, by LightLLM's names and some of ours: one for "
            "attention or the KV cache, and one for the weights; gN is the size of the groups of 4-bit weights "
            f"({', '.join(f'g{size}' for size in GROUPS)}). {IN_WORDS}. Unset, both are stored as data_type says, and "
            "the fastest attention for each shape is taken.",
            group=MODES,
            example='["triton_int8kv", "triton_w8a16"]',
        ),
    ] = []
    trust_remote_code: Annotated[
        bool,
        Setting(
            doc="Runs Python code that a checkpoint brings along: classes of .py files in the folder that auto_map in "
            "config.json, tokenizer_config.json or another settings file names. Off, such a checkpoint is refused at "
            "start. On, its config and its tokenizer run in processes of their own, as the daemon's user and with that "
            "user's rights; a model whose family is built in is computed by that, whatever modelling code there is, "
            "any other in the engine, with transformers.",
            group=MODEL,
        ),
    ] = False
    disable_log_stats: Annotated[
        bool,
        Setting(doc="No line with the throughput in the log.", group=STATISTICS, reload="live"),
    ] = False
    log_stats_interval: Annotated[
        float,
        Setting(
            doc="Time between two throughput lines while requests run; 0 means the built-in pace of 10 s.",
            group=STATISTICS,
            unit="s",
            minimum=0,
            maximum=86400,
            reload="live",
        ),
    ] = 0.0
    router_token_ratio: Annotated[
        float,
        Setting(
            doc="Below this share of used KV slots a request is admitted on the guess that it generates no more than "
            "router_max_new_token_len tokens; from it on, and always at 0, its whole max_new_tokens are reserved. "
            "When a guess was wrong the newest request is paused; to go on later it is computed again up to where it "
            "was, less what use_dynamic_prompt_cache still has of it; a beam search begins anew.",
            group=SCHEDULING,
            minimum=0,
            maximum=1,
        ),
    ] = 0.0
    router_max_new_token_len: Annotated[
        int,
        Setting(
            doc="The guess that router_token_ratio speaks of.",
            group=SCHEDULING,
            unit="tokens",
            minimum=1,
            maximum=_COUNT,
        ),
    ] = 1024
    router_max_wait_tokens: Annotated[
        int,
        Setting(
            doc="While requests run, new ones are admitted every so many rounds, run or waited: more favours the "
            "running ones, fewer the waiting ones.",
            group=SCHEDULING,
            unit="rounds",
            minimum=1,
            maximum=_COUNT,
        ),
    ] = 10
    use_dynamic_prompt_cache: Annotated[
        bool,
        Setting(
            doc="Keeps the KV cache of prompts and answers, and computes of a new prompt only what comes behind the "
            "longest beginning that is kept, to the token. It takes the KV slots that no request needs, and gives up "
            "the least recently used as soon as a request needs them: it delays none and takes no memory of its own. "
            "The prompt's last token is always computed. A request opts out with disable_prompt_cache. A new engine "
            "begins with an empty cache; lightllmctl cache shows and empties it.",
            group=SCHEDULING,
        ),
    ] = False
    splitfuse_block_size: Annotated[
        int,
        Setting(
            doc="Most prompt tokens that a step of splitfuse_mode computes beside running requests: fewer shorten the "
            "gaps in their streams, more let prompts through faster. Unused without it.",
            group=SCHEDULING,
            unit="tokens",
            minimum=1,
            maximum=_COUNT,
        ),
    ] = 256
    splitfuse_mode: Annotated[
        bool,
        Setting(
            doc="While requests run, prompts are cut into blocks of splitfuse_block_size, and each step computes one "
            "block beside the running requests' next tokens: a long prompt holds up no stream for longer than a block "
            "takes. Without it the others wait for a step that computes the whole prompt, which is faster for that "
            "prompt. While nothing runs, a step takes batch_max_tokens of prompts with and without it.",
            group=SCHEDULING,
        ),
    ] = False
    beam_mode: Annotated[
        bool,
        Setting(
            doc="best_of = n > 1 means beam search: the n best continuations that keeping n at every token finds, "
            "best first, by log-probability / length ** length_penalty; do_sample, top_p and top_k mean nothing then. "
            "A stop ends a beam as an eos does; of beams with the same text the best stays. "
            "The beams share the KV cache of what they have in common, and a step of theirs waits for the one before "
            "it. best_of = 1 is as without it. Not with diverse_mode or token_healing_mode.",
            group=MODES,
        ),
    ] = False
    diverse_mode: Annotated[
        bool,
        Setting(
            doc="best_of = n > 1 computes the prompt once for all n sequences, which share its KV cache and draw "
            "independently, with the seed of the request and their own number; greedy ones are alike. Without it each "
            "computes and keeps the prompt for itself. Not with beam_mode.",
            group=MODES,
        ),
    ] = False
    token_healing_mode: Annotated[
        bool,
        Setting(
            doc="Takes back the prompt's last tokens and lets the model write them anew, held to their text, so that a "
            "prompt that ends inside a word goes on well. The new ones are counted in max_new_tokens; their text up to "
            "where the prompt ended isn't repeated. Not with beam_mode.",
            group=MODES,
        ),
    ] = False
    enable_multimodal: Annotated[
        bool | Literal["auto"],
        Setting(
            doc="Requests may bring images, which a process of its own, the visual worker, fetches, decodes and "
            "encodes: see [images]. The model has to be one that sees; auto: if it is one. false: of such a model the "
            "text part is served, and its vision tower is not loaded.",
            group=IMAGES,
        ),
    ] = False
    cache_capacity: Annotated[
        int,
        Setting(
            doc="Images that are kept encoded, by their content: one that is asked about again is not encoded again. "
            "Those of running requests count, and no request may bring more. They are in host memory, which the "
            "largest ones have to have room in. Unused without enable_multimodal.",
            group=IMAGES,
            unit="images",
            minimum=1,
            maximum=1_000_000,
        ),
    ] = 200
    cache_reserved_ratio: Annotated[
        float,
        Setting(
            doc="Share of cache_capacity that stays filled when the image cache is full and room is made: of images "
            "that no request uses, those that were used the longest ago go until that many are left. Unused without "
            "enable_multimodal.",
            group=IMAGES,
            minimum=0,
            maximum=1,
        ),
    ] = 0.5
    data_type: Annotated[
        Literal["auto", "float16", "fp16", "bfloat16", "bf16", "float32", "fp32"],
        Setting(
            doc="Number format of weights, activations and KV cache. auto takes the checkpoint's own, float16 where it "
            "names none; on a CPU that is slow at it, the best that this CPU is fast at.",
            group=MODEL,
            page_default="float16",
        ),
    ] = "auto"
    return_all_prompt_logprobs: Annotated[
        bool,
        Setting(
            doc="Every answer of the native API that is no stream carries prompt_token_ids and, as prompt_logprobs, "
            "the log-probability of every prompt token but the first. That costs a product with the whole vocabulary "
            "for each of them, and the prompt is computed whole, whatever the prompt cache has of it. Without it a "
            "request may ask for them with prompt_logprobs.",
            group=MODES,
        ),
    ] = False
    use_reward_model: Annotated[
        bool,
        Setting(
            doc="The model is a reward model or a classifier: its results are scores of whole prompts, on "
            "/get_score, /score, /rerank, /classify and /pooling. Routes that generate refuse their requests. It has "
            "to be a model with such a head (InternLM2ForRewardModel, Qwen2ForRewardModel, Qwen2ForProcessRewardModel, "
            "or ...ForSequenceClassification of a family that is served).",
            group=MODEL,
        ),
    ] = False
    long_truncation_mode: Annotated[
        Literal["head", "center"] | None,
        Setting(
            doc="What happens to a prompt of more than max_req_input_len tokens: head cuts its beginning, so that the "
            "last max_req_input_len tokens stay; center cuts its middle, so that the first and the last halves of that "
            'stay, the last one a token longer where it is odd. Unset (or "None") the request is refused.',
            group=CAPACITY,
            reload="front end",
            example='"None"',
        ),
    ] = None
    use_tgi_api: Annotated[
        bool,
        Setting(
            doc="/generate, /generate_stream and / speak the format of Text Generation Inference (TGI), so that its "
            "clients work; /info tells what is served. OpenAI's routes are the same.",
            group=SERVING,
            reload="front end",
        ),
    ] = False
    health_monitor: Annotated[
        bool,
        Setting(
            doc="Sends a one-token request to every engine each [supervisor] health_interval and restarts the one that "
            "does not answer within health_timeout. What dies or makes no progress is always restarted, with or "
            "without it.",
            group=SERVING,
            reload="live",
        ),
    ] = False
    metric_gateway: Annotated[
        str | None,
        Setting(
            doc="host:port of a Prometheus Pushgateway that a process of its own pushes the metrics to. /metrics can "
            "always be pulled.",
            group=STATISTICS,
            pattern=r"(\[[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\]|[A-Za-z0-9._-]+):[0-9]{1,5}",
            form="of the form host:port without scheme and path, an IPv6 address in brackets: [::1]:9091",
            reload="live",
            example='"pushgateway.example.org:9091"',
        ),
    ] = None
    job_name: Annotated[
        str,
        Setting(
            doc="The job label of pushed metrics. With grouping_key it names the group that each push replaces.",
            group=STATISTICS,
            filled=True,
            reload="live",
        ),
    ] = "lightllm"
    grouping_key: Annotated[
        list[str],
        Setting(
            doc='Labels of pushed metrics beside the job: a list of "key=value" or a table. Each daemon that pushes to '
            "one gateway needs a group of its own.",
            group=STATISTICS,
            pattern=r"[a-zA-Z_][a-zA-Z0-9_]*=[\s\S]*",
            form='of the form "key=value", the key of letters, digits and _ and no digit first',
            pairs=True,
            reload="live",
            example='["instance=node7"]',
        ),
    ] = []
    push_interval: Annotated[
        int,
        Setting(
            doc="Time between two pushes of the metrics. It grows, up to a minute, while the gateway takes none.",
            group=STATISTICS,
            unit="s",
            minimum=1,
            maximum=86400,
            reload="live",
        ),
    ] = 10
    enable_monitor_auth: Annotated[
        bool,
        Setting(
            doc="Pushes with HTTP basic authentication; user and password are those of the environment variables "
            "USERNAME and PASSWORD of lightllmd.",
            group=STATISTICS,
            reload="live",
        ),
    ] = False
    quantise: QuantiseSettings = QuantiseSettings()


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A whole configuration file, as written, defaults filled in."""

    params: Params = Params()
    supervisor: SupervisorSettings = SupervisorSettings()
    http: HttpSettings = HttpSettings()
    log: LogSettings = LogSettings()
    engine: EngineSettings = EngineSettings()
    images: ImagesSettings = ImagesSettings()
    top: Params | None = None  # what `params` were before those of a named model, or a path, took their place
    models: dict[str, dict[str, Any]] = {}  # [models.NAME]: checked values of parameters, model_dir among them
    # where each key that is not a default was set ("models.NAME.key" too): its line in the file, 0: command line
    places: dict[str, int] = {}
    held_keys: KeyRing | None = None  # what the key files held when this was loaded; no setting
    warnings: list[str] = []  # about what is valid and unwise

    @property
    def keys(self) -> KeyRing:
        """What clients must present; empty where no key file is named."""
        return self.held_keys or KeyRing()
