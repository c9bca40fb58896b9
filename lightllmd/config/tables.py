"""Our own tables beside the documented parameters. Times are in seconds."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from lightllmd.config.layer_rules import FORM
from lightllmd.config.setting import Reload, Setting

YEAR = 366 * 86400.0  # seconds; the longest of all spans of time


def _seconds(doc: str, *, zero: bool = False, reload: Reload = "live") -> Setting:
    """A span of time; `zero` allows 0."""
    above = None if zero else 0.0
    return Setting(doc=doc, unit="s", minimum=0 if zero else None, above=above, maximum=YEAR, reload=reload)


class SupervisorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the daemon keeps its workers alive."""

    control_socket: Annotated[
        str,
        Setting(
            doc="Path of the control socket that lightllmctl talks to. Empty: control.sock in $RUNTIME_DIRECTORY, else "
            "in /run/lightllmd for root, else in $XDG_RUNTIME_DIR/lightllmd.",
            example='"/run/lightllmd/control.sock"',
            reload="restart",
        ),
    ] = ""
    drain_timeout: Annotated[float, _seconds("SIGTERM: how long requests in flight may go on.", zero=True)] = 60.0
    stop_timeout: Annotated[float, _seconds("A child that was told to stop is killed after this.")] = 10.0
    hang_timeout: Annotated[
        float, _seconds("A worker that makes no progress this long, idle or serving, is aborted and replaced.")
    ] = 10.0
    boot_timeout: Annotated[float, _seconds("From a worker's start to the end of its imports.")] = 120.0
    load_timeout: Annotated[float, _seconds("Longest time without a byte of progress while weights load.")] = 60.0
    warmup_timeout: Annotated[float, _seconds("From loaded weights to the first real token.")] = 120.0
    abort_grace: Annotated[
        float, _seconds("Between SIGABRT, on which a worker prints its stacks, and SIGKILL.", zero=True)
    ] = 2.0
    memory_timeout: Annotated[
        float,
        _seconds("How long a restart waits for the memory of its plan to become free again.", zero=True),
    ] = 30.0
    spare_engine: Annotated[
        bool,
        Setting(
            doc="Keep a second engine process (one for each rank) that waits, with its imports done and on a GPU with "
            "its CUDA context made: the next restart or swap takes it, which makes either some seconds shorter. Takes "
            "about 0.5 GB of host memory, and about 0.5 GB of its GPU's, for which the budget reserves 0.6 GB (the KV "
            "cache of 4,600 tokens of an 8B model). false keeps none; the KV cache grows with the engine's next start.",
            reload="live",
        ),
    ] = True
    swap: Annotated[
        Literal["auto", "beside", "after"],
        Setting(
            doc="How a new model, or new settings of the engine, come into service. beside: the new engine loads while "
            "the old one serves on. Room is kept for it: for any other model of [models] (with max_total_token_num = "
            "auto, as much KV cache as the one that serves has), so that every swap between them finds it; a model "
            "that leaves none is refused. What finds no room all the same comes as with after. after: it loads when "
            "the old one has finished its requests and let go of its memory; new requests wait meanwhile. auto: beside "
            "where that costs no KV cache, else after; no room is kept. What is kept is settled with each new engine.",
            reload="live",
        ),
    ] = "auto"
    health_interval: Annotated[
        float, _seconds("With health_monitor: from one probe's answer to the next probe of that engine.")
    ] = 60.0
    health_timeout: Annotated[
        float, _seconds("With health_monitor: an engine that has not answered its probe by then is restarted.")
    ] = 60.0
    backoff_initial: Annotated[
        float, _seconds("Pause before the second start of an engine that died without a token.")
    ] = 0.5
    backoff_max: Annotated[float, _seconds("The pause doubles with each such death, up to this.")] = 30.0
    start_limit_burst: Annotated[
        int,
        Setting(
            doc="Failed starts within start_limit_interval after which only slow retries go on.",
            unit="starts",
            minimum=1,
            maximum=10_000,
            reload="live",
        ),
    ] = 5
    start_limit_interval: Annotated[float, _seconds("The span that start_limit_burst counts in.")] = 600.0
    retry_interval: Annotated[float, _seconds("Pause between the slow retries.")] = 60.0
    log_lines: Annotated[
        int,
        Setting(
            doc="Lines of each worker that are kept for lightllmctl logs.",
            unit="lines",
            minimum=10,
            maximum=1_000_000,
            reload="live",
        ),
    ] = 2000


class HttpSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP front end."""

    workers: Annotated[
        int,
        Setting(
            doc="Processes that answer HTTP requests, sharing one listening socket.",
            unit="processes",
            minimum=1,
            maximum=64,
            reload="front end",
        ),
    ] = 1
    api_keys_file: Annotated[
        str,
        Setting(
            doc="File of API keys, which clients send as 'Authorization: Bearer KEY', x-api-key or api-key. Empty: no "
            "authentication. Either a table [keys.NAME] for each key, with its hash, expiry and limits, which "
            "lightllmctl key makes; or a list of keys, one a line, which may do all. What it holds by then is in force "
            "by itself within seconds, another name after a reload.",
            example='"/etc/lightllmd/keys.toml"',
            reload="live",
        ),
    ] = ""
    metrics_key: Annotated[
        str,
        Setting(
            doc="Who may read /metrics. Empty: operators, whose key in api_keys_file has admin = true (those of a list "
            "have); where there are no keys, every client. none: every client, without a key; the numbers tell how "
            "much is asked of the server, nothing of what. A file of keys: a client that sends one of these; those of "
            "api_keys_file don't do then.",
            example='"/etc/lightllmd/metrics_keys"',
            pattern=r"(none|.*/.*)?",
            form='empty, "none", or the path of a key file',
            reload="live",
        ),
    ] = ""
    served_model_name: Annotated[
        str,
        Setting(
            doc="Name of the model in answers. Empty: the last component of model_dir.",
            example='"smollm2"',
            reload="front end",
        ),
    ] = ""
    hold_timeout: Annotated[
        float, _seconds("How long a request waits for an engine to come back, then 504.", reload="front end")
    ] = 120.0
    max_held: Annotated[
        int,
        Setting(
            doc="Requests that each front end process holds while no engine is ready; beyond that, 429.",
            unit="requests",
            minimum=0,
            maximum=1_000_000,
            reload="front end",
        ),
    ] = 1024
    max_queue: Annotated[
        int,
        Setting(
            doc="Sequences that may wait for admission: while fewer do, a request is taken with all that it brings, "
            "which is at most running_max_req_size + max_queue sequences; otherwise it gets 429. A client of which "
            "nothing waits may wait beside twice as many.",
            unit="sequences",
            minimum=1,
            maximum=1_000_000,
            reload="engine",
        ),
    ] = 1024
    queue_timeout: Annotated[
        float,
        _seconds(
            "How long a request may wait for admission, then 504; 0: for ever. One of whose body a part has been "
            "admitted goes on waiting.",
            zero=True,
            reload="engine",
        ),
    ] = 600.0
    priority_ageing: Annotated[
        float,
        _seconds(
            "How many seconds of waiting a step of a request's priority is worth: one of priority 1 is overtaken by "
            "those of priority 0 that come up to so much later, and by none after; 0: priorities are of no effect.",
            zero=True,
            reload="engine",
        ),
    ] = 10.0
    fair_admission: Annotated[
        bool,
        Setting(
            doc="Requests that wait are admitted fairly, by tokens, between API keys or, where there are none, client "
            "addresses (IPv6: networks of 64 bits), and in the order of arrival within one. false: in the order of "
            "arrival alone.",
            reload="front end",
        ),
    ] = True
    trusted_proxies: Annotated[
        list[str],
        Setting(
            doc="Addresses or networks of proxies whose X-Forwarded-For names the client, unix for what connects to "
            "unix_socket; nothing else's is believed.",
            pattern=r"unix|[0-9a-fA-F.:]+(/[0-9]{1,3})?",
            form="unix, or an address or network such as 10.0.0.0/8",
            example='["127.0.0.1", "10.0.0.0/8"]',
            reload="front end",
        ),
    ] = []
    hold_keepalive: Annotated[
        float, _seconds("Time between the comments that keep a held stream's connection open.", reload="front end")
    ] = 5.0
    max_body_bytes: Annotated[
        int,
        Setting(
            doc="Largest body of a request; a larger one gets 413.",
            unit="bytes",
            minimum=1024,
            maximum=1 << 30,
            reload="front end",
        ),
    ] = 16 << 20
    unknown_fields: Annotated[
        Literal["ignore", "refuse"],
        Setting(
            doc="What becomes of fields that this server does not know, on the OpenAI routes and at the top level of "
            "the native ones. ignore: they are passed over, and named in the response header x-lightllmd-ignored and "
            "once for each client in the log. refuse: 400 with the nearest known name. In parameters of the native "
            "routes unknown names are always refused.",
            reload="front end",
        ),
    ] = "ignore"
    tool_parser: Annotated[
        Literal[
            "auto",
            "harmony",
            "gemma4",
            "deepseek_v32",
            "deepseek_v31",
            "deepseek_v3",
            "kimi_k2",
            "glm45",
            "minimax_m2",
            "seed_oss",
            "qwen3_coder",
            "mistral_v11",
            "mistral",
            "phi4_mini",
            "granite",
            "command_r",
            "jamba",
            "hermes",
            "pythonic",
            "llama3_json",
        ],
        Setting(
            doc="The format in which the model calls tools. auto: the one that its chat template writes; hermes where "
            "that is none of these, or where the template knows no tools, which are described in a message then.",
            reload="front end",
        ),
    ] = "auto"
    reasoning: Annotated[
        Literal["apart", "content"],
        Setting(
            doc="Where a model's reasoning is told, if its chat template has marks around it. apart: in "
            "reasoning_content. content: within the text, as the model wrote it. A request's separate_reasoning says "
            "otherwise.",
            reload="front end",
        ),
    ] = "apart"
    header_timeout: Annotated[
        float,
        _seconds(
            "From a connection, or from a request's first byte, to the end of its header; then 408. A TLS handshake "
            "has as long.",
            reload="front end",
        ),
    ] = 20.0
    body_timeout: Annotated[
        float,
        _seconds(
            "From the header to the end of the body, beside the time that min_rate gives for what came; then 408.",
            reload="front end",
        ),
    ] = 20.0
    write_timeout: Annotated[
        float,
        _seconds(
            "A client that takes less than min_rate of an answer for this long, with more waiting, is cut off.",
            reload="front end",
        ),
    ] = 30.0
    keep_alive_timeout: Annotated[
        float,
        _seconds(
            "An idle connection is closed after this. More than a proxy keeps its own (60 s at most of them), else it "
            "may send a request at the very moment.",
            reload="front end",
        ),
    ] = 75.0
    min_rate: Annotated[
        int,
        Setting(
            doc="The slowest pace at which a body may come and an answer may be taken.",
            unit="bytes/s",
            minimum=1,
            maximum=1 << 30,
            reload="front end",
        ),
    ] = 1024
    max_connections: Annotated[
        int | Literal["auto"],
        Setting(
            doc="Connections of each front end process. Beyond that, one on which no request has come for the longest "
            "time is closed; where there is none, a new one gets 503, but for the health routes. auto: what its "
            "descriptors (ulimit -n) leave, 16384 at most.",
            unit="connections",
            minimum=1,
            maximum=1_000_000,
            reload="front end",
        ),
    ] = "auto"
    max_body_bytes_in_flight: Annotated[
        int | Literal["auto"],
        Setting(
            doc="Memory of each front end process for bodies that are coming in or being decoded; what finds no room "
            "gets 503. At least twice max_body_bytes; auto: eight times.",
            unit="bytes",
            minimum=2048,
            maximum=1 << 40,
            reload="front end",
        ),
    ] = "auto"
    stored_responses: Annotated[
        int,
        Setting(
            doc="Responses of /v1/responses that are kept for GET and previous_response_id, by all api workers "
            "together, each for the API key alone that it was made with; those that were used the longest ago make "
            "room. 0: none, and previous_response_id is refused. They are in the runtime directory until the daemon "
            "ends.",
            unit="responses",
            minimum=0,
            maximum=1_000_000,
            reload="front end",
        ),
    ] = 4096
    stored_responses_bytes: Annotated[
        int,
        Setting(
            doc="What all of them may take, each with its own input and output, without those before it in its "
            "conversation; of one alone that is larger nothing is kept.",
            unit="bytes",
            minimum=1 << 16,
            maximum=1 << 40,
            reload="front end",
        ),
    ] = 64 << 20
    stored_responses_ttl: Annotated[
        float, _seconds("How long a response is kept after it was made or last continued.", reload="front end")
    ] = 86400.0
    page: Annotated[
        bool,
        Setting(
            doc="A page for browsers at /, with the daemon's state and a chat. Where API keys are required it tells "
            "without one what /health tells, and nothing else.",
            reload="front end",
        ),
    ] = True
    cors_origins: Annotated[
        list[str],
        Setting(
            doc='Web origins whose pages may call the server; "*" for all.',
            pattern=r"\*|https?://[^/\s]+",
            form='"*" or an origin such as "https://chat.example.org", without a path',
            example='["https://chat.example.org"]',
            reload="front end",
        ),
    ] = []
    unix_socket: Annotated[
        str,
        Setting(
            doc="Path of a Unix socket that is listened on, too: plain HTTP, for a proxy or clients on this host. A "
            "stale one is replaced, and it is removed at the end. Where systemd hands sockets over, those alone count.",
            example='"/run/lightllmd/http.sock"',
            pattern=r"(/.*)?",
            form="an absolute path",
            reload="front end",
        ),
    ] = ""
    unix_socket_mode: Annotated[
        str,
        Setting(
            doc="Who may connect to unix_socket: its permissions in octal digits.",
            pattern=r"0?[0-7]{3}",
            form="three octal digits such as 0660",
            reload="front end",
        ),
    ] = "0660"
    unix_socket_owner: Annotated[
        str,
        Setting(
            doc="User and group of unix_socket, either of which may be missing. Empty: those of the daemon.",
            example='":www-data"',
            pattern=r"[A-Za-z0-9._-]*(:[A-Za-z0-9._-]+)?",
            form='of the form "user:group", "user" or ":group"',
            reload="front end",
        ),
    ] = ""
    tcp: Annotated[
        bool,
        Setting(doc="Whether host and port are listened on. false: unix_socket alone is.", reload="front end"),
    ] = True
    tls_certificate: Annotated[
        str,
        Setting(
            doc="PEM file with the certificate chain, the server's own first; HTTPS (TLS 1.2 or newer) instead of "
            "HTTP, but on unix_socket. What this and the next two files hold is looked at all the time: a changed pair "
            "serves new connections at once, one that can't be used leaves the present one in force.",
            example='"/etc/lightllmd/tls.crt"',
            reload="front end",
        ),
    ] = ""
    tls_key: Annotated[
        str,
        Setting(
            doc="PEM file with the certificate's key, without a passphrase.",
            example='"/etc/lightllmd/tls.key"',
            reload="front end",
        ),
    ] = ""
    tls_client_ca: Annotated[
        str,
        Setting(
            doc="PEM file with the authorities one of which has to have signed a client's certificate (mutual TLS). "
            "Empty: clients need none.",
            example='"/etc/lightllmd/clients.crt"',
            reload="front end",
        ),
    ] = ""

    @property
    def tls_files(self) -> tuple[str, str, str]:
        """Paths of certificate, key and authorities of clients; empty where there is none."""
        return self.tls_certificate, self.tls_key, self.tls_client_ca

    @property
    def key_files(self) -> dict[str, str]:
        """Paths by the setting that names them."""
        named = {"http.api_keys_file": self.api_keys_file, "http.metrics_key": self.metrics_key}
        return {key: path for key, path in named.items() if path not in ("", "none")}


class QuantiseSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How single layers and matrices are stored, where mode doesn't say it. It stands in [models.NAME.quantise] too."""

    rules: Annotated[
        list[str],
        Setting(
            doc=f"Each says of some matrices how they are stored. It is of the form {FORM}. The last one that covers a "
            "matrix counts, before all of them what mode says, and without any it is stored as data_type says: dense.",
            example='["all: w4a16 g64", "0-3: w8a16", "down 28-29: dense"]',
        ),
    ] = []
    mixdown: Annotated[
        str,
        Setting(
            doc="Layers whose down matrix mode ppl_w8a8_mixdown leaves as it is, such as 0-3,7. Empty: those that the "
            "list mixdown in the model's config.json names, and all where there is none.",
            example='"0-3,7"',
        ),
    ] = ""


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The log on standard error."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Setting(doc="The least important lines that are written.", reload="live"),
    ] = "info"
    format: Annotated[
        Literal["text", "json"],
        Setting(doc="Lines for people, or one JSON object a line.", reload="live"),
    ] = "text"


class FakeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The engine without a model, for tests of everything around it."""

    tokens_per_second: Annotated[
        float,
        Setting(
            doc="Pace of each sequence; 0: as fast as the engine's loop turns.",
            unit="tokens/s",
            minimum=0,
            maximum=1e9,
        ),
    ] = 0.0
    overlap: Annotated[
        bool, Setting(doc="Launch each step before the tokens of the one before it are collected, as on a GPU.")
    ] = False
    load_seconds: Annotated[float, _seconds("How long loading pretends to take.", zero=True, reload="engine")] = 0.0
    load_bytes: Annotated[
        int, Setting(doc="Pretended size of the weights.", unit="bytes", minimum=0, maximum=1 << 50)
    ] = 0
    score_labels: Annotated[
        int,
        Setting(doc="With use_reward_model, how many scores each place of a prompt has.", minimum=1, maximum=4096),
    ] = 1
    score_marker: Annotated[
        int,
        Setting(
            doc="With use_reward_model, the token whose every occurrence in a prompt is scored. -1: its last token is.",
            minimum=-1,
            maximum=256,
        ),
    ] = -1
    embedding_size: Annotated[int, Setting(doc="How many values an embedding has.", minimum=1, maximum=65536)] = 8
    image_tokens: Annotated[
        int,
        Setting(doc="With enable_multimodal, how many tokens each image is.", unit="tokens", minimum=1, maximum=65536),
    ] = 4
    poison: Annotated[
        str,
        Setting(
            doc="The engine dies when it first runs a prompt that contains this text. Empty: none.",
            example='"poison"',
        ),
    ] = ""
    poison_way: Annotated[
        Literal["SIGSEGV", "SIGKILL", "SIGABRT", "exception", "exit", "hang"],
        Setting(doc="How it dies of poison."),
    ] = "SIGSEGV"
    fault: Annotated[
        Literal["", "exit_at_boot", "config", "memory", "crash_in_load", "hang_in_load", "hang_when_ready"],
        Setting(doc="What goes wrong on the way to readiness. Empty: nothing.", example='"hang_in_load"'),
    ] = ""
    fault_file: Annotated[
        str,
        Setting(
            doc="The fault happens only while this file exists, and is the one that the file names if it names one. "
            "A relative path begins at model_dir, so that one model has a fault and another has not. Empty: always.",
            example='"fault"',
        ),
    ] = ""
    fault_rank: Annotated[
        int, Setting(doc="Which of the tp ranks goes wrong, or dies of poison.", minimum=0, maximum=1023)
    ] = 0


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The engine: what computes tokens."""

    backend: Annotated[
        Literal["auto", "lightllmd", "transformers", "fake"],
        Setting(
            doc="What computes the model. lightllmd: its own decoder and kernels, for the families that it knows. "
            "transformers: the modules of that library, or those that the model brings along (trust_remote_code), "
            "over the same KV cache, scheduler and sampling, more slowly. auto: lightllmd where a family fits, else "
            "transformers. fake invents deterministic tokens without a model (see [engine.fake]).",
        ),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Setting(doc="Where the model runs. auto: a GPU where there is a usable one, else the CPU."),
    ] = "auto"
    threads: Annotated[
        int,
        Setting(
            doc="CPU threads that compute. 0: one for each physical core that the daemon may use.",
            unit="threads",
            minimum=0,
            maximum=4096,
        ),
    ] = 0
    replicas: Annotated[
        int,
        Setting(
            doc="Data parallelism: so many engines serve the same model side by side, each on devices of its own (tp "
            "of them) and with a KV cache of its own; each request goes to one of them. When one dies, the others "
            "take over its requests. On a CPU they share its cores and memory.",
            unit="engines",
            minimum=1,
            maximum=64,
        ),
    ] = 1
    degrade: Annotated[
        bool,
        Setting(
            doc="What is done where there are fewer usable GPUs than tp x replicas, as when one was lost. true: as "
            "many replicas are served as there are GPUs for, and where there are too few for one, it is cut over as "
            "many as there are; what that costs is told as a warning. false: that is refused.",
            reload="live",
        ),
    ] = False
    memory_fraction: Annotated[
        float,
        Setting(doc="Share of the device's free memory that the engine may plan with.", above=0, maximum=1),
    ] = 0.9
    cuda_graphs: Annotated[
        bool,
        Setting(
            doc="Decode steps and short prefills are replayed from CUDA graphs, which spares the host their launches. "
            "false is for debugging: every step is launched operation by operation, the same tokens come more slowly. "
            "Without a GPU it changes nothing.",
        ),
    ] = True
    overlap: Annotated[
        bool,
        Setting(
            doc="The next step is launched while the one before it computes. false is for debugging: each step is "
            "waited for, the same tokens come more slowly. Without a GPU it changes nothing.",
        ),
    ] = True
    graph_max_rows: Annotated[
        int,
        Setting(
            doc="Decode steps with more rows than this are launched without a CUDA graph, which saves the graphs' "
            "memory and the time of their capture. 0: every step up to running_max_req_size has one.",
            unit="sequences",
            minimum=0,
            maximum=65536,
        ),
    ] = 0
    gguf: Annotated[
        Literal["auto", "quantised", "dense"],
        Setting(
            doc="What becomes of a GGUF file's quantised matrices. quantised: those of types that a scheme holds "
            "without loss (Q4_0, Q5_0, Q8_0, Q6_K) stay as they are, in the memory that this takes; others are "
            "dequantised. dense: all are dequantised. auto: quantised where the device multiplies faster so: a GPU, "
            "and a CPU with 4 bits. A mode that quantises weights does so with what is dequantised.",
        ),
    ] = "auto"
    keep_quantised: Annotated[
        bool,
        Setting(
            doc="Whether weights that are quantised while they are loaded are kept in a file below the cache directory "
            "(quantised/), so that the next start reads that instead of the larger checkpoint. It is made anew where "
            "the checkpoint's files, the schemes or the program's way of quantising have changed, or the file is "
            "damaged. Such files take up to half of what their disk has free without them; those that were used the "
            "longest ago go first.",
        ),
    ] = False
    logprobs: Annotated[
        Literal["raw", "processed"],
        Setting(
            doc="Which distribution the log-probabilities of generated tokens are of. raw: the model's, before biases, "
            "penalties, masks and temperature, as those of a prompt are in any case. processed: what is drawn from, "
            "before top-p, top-k and min-p, as LightLLM tells.",
        ),
    ] = "raw"
    pooling: Annotated[
        Literal["auto", "last", "mean", "cls"],
        Setting(
            doc="What /v1/embeddings tells of a prompt's last hidden states: that of the last token, the mean of all "
            "(mean), or that of the first token (cls). auto: what the model's settings for sentence-transformers say "
            "(modules.json), or its GGUF file; where there are none, last. Vectors have the length 1, unless those "
            "settings have no module that normalises.",
        ),
    ] = "auto"
    fake: FakeSettings = FakeSettings()
