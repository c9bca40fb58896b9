"""The one declaration of every setting. (Types and names are fixed here; documentation metadata is added to it.)"""

from __future__ import annotations

from typing import Literal

import msgspec


class Params(msgspec.Struct, frozen=True, kw_only=True):
    """The 40 documented LightLLM API-server parameters."""

    host: str = "127.0.0.1"
    port: int = 8000
    model_dir: str | None = None
    tokenizer_mode: Literal["auto", "slow", "fast"] = "auto"
    load_way: Literal["HF", "DS", "DUMMY"] = "HF"
    max_total_token_num: int | Literal["auto"] = "auto"
    batch_max_tokens: int | None = None
    eos_id: list[int] | Literal["auto"] = "auto"
    running_max_req_size: int = 1000
    tp: int = 1
    max_req_input_len: int = 2048
    max_req_total_len: int = 3072
    nccl_port: int = 28765
    mode: list[str] = []
    trust_remote_code: bool = False
    disable_log_stats: bool = False
    log_stats_interval: float = 0.0
    router_token_ratio: float = 0.0
    router_max_new_token_len: int = 1024
    router_max_wait_tokens: int = 10
    use_dynamic_prompt_cache: bool = False
    splitfuse_block_size: int = 256
    splitfuse_mode: bool = False
    beam_mode: bool = False
    diverse_mode: bool = False
    token_healing_mode: bool = False
    enable_multimodal: bool = False
    cache_capacity: int = 200
    cache_reserved_ratio: float = 0.5
    data_type: Literal["auto", "float16", "fp16", "bfloat16", "bf16", "float32", "fp32"] = "auto"
    return_all_prompt_logprobs: bool = False
    use_reward_model: bool = False
    long_truncation_mode: Literal["head", "center"] | None = None
    use_tgi_api: bool = False
    health_monitor: bool = False
    metric_gateway: str | None = None
    job_name: str = "lightllm"
    grouping_key: list[str] = []
    push_interval: int = 10
    enable_monitor_auth: bool = False


class SupervisorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[supervisor]. Times in seconds."""

    control_socket: str = ""  # "": control.sock in $RUNTIME_DIRECTORY, else the default place
    drain_timeout: float = 60.0  # SIGTERM: what is in flight may finish this long
    stop_timeout: float = 10.0  # a child told to stop is killed after this
    hang_timeout: float = 10.0  # no progress while idle or serving
    boot_timeout: float = 120.0  # from spawn to the first heartbeat and to the end of imports
    load_timeout: float = 60.0  # without a byte of progress while loading
    warmup_timeout: float = 120.0
    abort_grace: float = 2.0  # between SIGABRT (stacks) and SIGKILL
    backoff_initial: float = 0.5
    backoff_max: float = 30.0
    start_limit_burst: int = 5  # failed starts within the interval, then only slow retries
    start_limit_interval: float = 600.0
    retry_interval: float = 60.0  # the slow retry after the limit
    log_lines: int = 2000  # kept per worker for `lightllmctl logs`


class HttpSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[http]"""

    workers: int = 1
    api_keys_file: str = ""  # one key a line; "": no authentication
    served_model_name: str = ""  # "": the last component of model_dir
    hold_timeout: float = 120.0  # seconds a request is held without an engine, then 504
    max_held: int = 1024  # requests held per api worker without an engine, then 429
    max_queue: int = 1024  # branches waiting in the scheduler, then 429
    hold_keepalive: float = 5.0  # seconds between SSE comments while a stream is held
    max_body_bytes: int = 16 << 20
    cors_origins: list[str] = []
    tls_certificate: str = ""
    tls_key: str = ""


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[log]"""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class FakeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[engine.fake]: the engine without a model, for tests of everything around it."""

    tokens_per_second: float = 0.0  # per branch; 0: as fast as the loop turns
    load_seconds: float = 0.0
    load_bytes: int = 0  # pretended size, for progress
    poison: str = ""  # a prompt that contains this text ends the engine when it is first run
    poison_way: Literal["SIGSEGV", "SIGKILL", "SIGABRT", "exception", "exit", "hang"] = "SIGSEGV"
    fault: Literal["", "exit_at_boot", "config", "memory", "crash_in_load", "hang_in_load", "hang_when_ready"] = ""
    fault_file: str = ""  # a fault that needs this file to exist: tests make and remove it


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[engine]"""

    backend: Literal["torch", "fake"] = "torch"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0  # CPU threads of the engine; 0: the physical cores
    memory_fraction: float = 0.9  # of the free memory that the plan may use
    fake: FakeSettings = FakeSettings()


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A whole configuration file, as written, defaults filled in."""

    params: Params = Params()
    supervisor: SupervisorSettings = SupervisorSettings()
    http: HttpSettings = HttpSettings()
    log: LogSettings = LogSettings()
    engine: EngineSettings = EngineSettings()
    models: dict[str, dict[str, object]] = {}
