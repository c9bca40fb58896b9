"""Every message that crosses a process border, as msgspec structs in MessagePack. Plain data only.

Three links exist:

* supervisor <-> child, over a socketpair (`Channel`): `Down` messages go down, `Up` messages come up;
* api -> engine, over ZeroMQ (`bus`): `ToEngine`;
* engine -> api, over ZeroMQ: `ToApi`, one `StepOutput` per step and api worker, arrays of deltas.

A *branch* is one of the ``n`` sequences of a request; `position` counts that branch's generated tokens from 0.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeAlias

import msgspec

PROTOCOL = 3  # raised when a message changes its meaning; both ends must agree


def request_id(api: int, epoch: int, sequence: int) -> int:
    """A number unique within a daemon's life: 8 bits api worker, 16 bits its epoch, 39 bits sequence."""
    return (api & 0xFF) << 55 | (epoch & 0xFFFF) << 39 | (sequence & 0x7FFFFFFFFF)


# --- requests ---------------------------------------------------------------------------------------------


class TextStops(msgspec.Struct, frozen=True, omit_defaults=True):
    """What ends a sequence because of its text, and how its tokens become text."""

    strings: tuple[str, ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()
    include_stop: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    print_eos_token: bool = False
    marks: tuple[str, ...] = ()  # see Tokenizer.detokenizing


GrammarKind = Literal["json_object", "json_schema", "regex", "ebnf", "choice", "structural_tag"]


class Grammar(msgspec.Struct, frozen=True):
    """What the text of a sequence has to be; see `requests.constraint`. The engine gets those that have been compiled
    once, within bounds: of kind ``ebnf`` or ``structural_tag``."""

    kind: GrammarKind
    text: str
    whitespace: str | None = None  # a pattern of what stands between tokens of JSON; None: the usual


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, tag="sampling"):
    """How the next token of each branch is chosen. Already validated; the engine trusts it.

    ``do_sample = False`` is greedy: temperature, top_p, top_k, min_p and typical_p are ignored. The order of
    application is penalties, eos decay, eos mask below ``min_new_tokens``, temperature, softmax, then top_p, top_k,
    min_p and typical_p together: each looks at the whole softmax, and a token is kept if all of them keep it; where
    there is none such, typical_p doesn't count.
    """

    n: int = 1  # branches, each numbered 0..n-1
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0  # (0, 1]
    top_k: int = -1  # -1: off
    min_p: float = 0.0  # [0, 1], least probability in units of the highest one; 0: off
    typical_p: float = 1.0  # (0, 1], mass of the tokens whose surprise is nearest to the entropy; 1: off
    presence_penalty: float = 0.0  # subtracted once from each token that occurred
    frequency_penalty: float = 0.0  # subtracted per occurrence
    repetition_penalty: float = 1.0  # logit > 0: divided, else multiplied
    exponential_decay_length_penalty: tuple[int, float] = (1, 1.0)  # (start, factor) on the eos logits
    input_penalty: bool = False  # the three penalties count the prompt's tokens too
    ignore_eos: bool = False
    max_new_tokens: int = 16
    min_new_tokens: int = 1
    seed: int = 0  # always set by the ledger: the client's, or one that it drew; 0 .. 2**63 - 1
    top_logprobs: int = 0  # alternatives reported beside the chosen token, 0..20
    logit_bias: dict[int, float] = {}  # token -> added to its logit before everything else
    # No other is generated, eos included, but for those that write what `healing` took back. None: all are allowed.
    allowed_token_ids: list[int] | None = None
    bad_words: list[list[int]] = []  # token sequences that are never completed
    # The text keeps to it. Where it can't go on the generation ends, whatever ignore_eos and min_new_tokens say; where
    # it may end these decide.
    grammar: Grammar | None = None
    healing: bytes = b""  # the text begins with these bytes, which were taken back from the prompt
    prompt_logprobs: int = -1  # alternatives reported beside each prompt token's log-probability, 0..20; -1: neither
    use_cache: bool = True  # of prompts: False: neither reads nor fills it
    length_penalty: float = 1.0  # beam search: a hypothesis scores its log-probability / length ** length_penalty
    # Of beam search, where a stop ends a hypothesis; what ends any other sequence is found where its text is made.
    stops: TextStops | None = None
    candidates: int = 0  # set by the scheduler, of beams: the tokens that each reports to go on with, 0..64


class PoolingParams(msgspec.Struct, frozen=True, omit_defaults=True, tag="pooling"):
    """Nothing is generated: the request ends with its prompt, and its result is vectors of some of the hidden states.
    A model that scores has its own head make one of each; any other has its last norm, which is an embedding of the
    prompt. Already validated; the engine trusts it.

    Such a request has one branch, 0, without tokens. What it would have for parameters of generation is said once, so
    that admission, slots and prompt cache treat it as any other.
    """

    # Ascending indices of the prompt's tokens that a vector each is made at; None: at the last token.
    at: list[int] | None = None
    use_cache: bool = True  # of prompts: False: neither reads nor fills it
    # Of an embedding: one vector, the mean of those of all tokens of the prompt, which `at` doesn't restrict then.
    mean: bool = False
    size: int = 0  # its first so many values are told; 0: all
    unit: bool = False  # what is told is divided by its Euclidean length

    n: ClassVar[int] = 1
    max_new_tokens: ClassVar[int] = 0
    min_new_tokens: ClassVar[int] = 0
    ignore_eos: ClassVar[bool] = True
    prompt_logprobs: ClassVar[int] = -1
    top_logprobs: ClassVar[int] = 0
    healing: ClassVar[bytes] = b""
    grammar: ClassVar[Grammar | None] = None


RequestParams: TypeAlias = SamplingParams | PoolingParams


class ImageSpan(msgspec.Struct, frozen=True, omit_defaults=True):
    """The run of a prompt's tokens whose embeddings are those of one image. Their ids are the model's placeholder and
    say nothing of the image; whatever depends on the image's content goes by `key`."""

    start: int  # index of its first token in the prompt
    tokens: int  # how many; at least 1
    # 16 bytes, equal for equal embeddings alone: BLAKE2b, with a random key of the daemon, of the decoded picture and
    # all else that its embeddings depend on. No client can choose two pictures with one key.
    key: bytes
    grid: tuple[int, int, int] = (1, 0, 0)  # frames, rows and columns, where rotary positions are those of a grid


class Submit(msgspec.Struct, tag="submit"):
    """A request enters (or, after an engine's death, re-enters) an engine generation."""

    request: int
    api: int
    epoch: int
    arrival_ns: int  # time.monotonic_ns() when the ledger took it; replay goes in this order
    prompt_ids: list[int]
    params: RequestParams
    branches: list[int]  # the branches still unfinished
    emitted: list[list[int]]  # per entry of `branches`: tokens already given to the client
    batch: int = 0  # the number of the first of those that came in one body; 0: there is no other
    tenant: int = 0  # whose it is, as far as admission is fair between several: any number
    weight: float = 1.0  # the tenant's share of admission, in units of the others'; above 0
    priority: int = 0  # less is sooner among those that wait
    replay: bool = False  # an engine had it: it is never turned away, and goes ahead of the queue if it has a token
    # Engines that died of it, perhaps: deaths since its last token with a part of its prompt in a step that was out.
    # If there are any, it runs alone, see Scheduler.
    suspect: int = 0
    images: list[ImageSpan] = []  # ascending by start, none overlaps another or reaches beyond the prompt


class Abort(msgspec.Struct, tag="abort"):
    """Ends some branches (None: all) of a request. Unknown requests are ignored."""

    request: int
    branches: list[int] | None = None


class Hello(msgspec.Struct, tag="hello"):
    """The first message of an api worker, so that the engine sends it `Load`."""

    api: int
    epoch: int
    protocol: int = PROTOCOL


ToEngine = Submit | Abort | Hello

# ABORT: the model's logits are no numbers, this branch can't go on.
FINISH_NONE, FINISH_STOP, FINISH_LENGTH, FINISH_ABORT = 0, 1, 2, 3


class PromptLogprobs(msgspec.Struct):
    """A part of a request's prompt: entry i tells of prompt token ``first + i``; none tells of token 0. The parts come
    in order, all of them before or with the first token. After a replay they may come again from the first on."""

    request: int
    first: int
    logprobs: list[float]
    alternatives: list[list[tuple[int, float]]] | None  # best first


class Pooled(msgspec.Struct):
    """The result of a request with `PoolingParams`, whole: it has ended with it."""

    request: int
    # fp32, little-endian, one vector for each place that was asked for; None: they are not all finite numbers.
    vectors: list[bytes] | None


class StepOutput(msgspec.Struct, tag="step"):
    """What one step produced for one api worker. Parallel arrays, one entry per branch that moved.

    The ledger takes entry i only when ``positions[i]`` equals the number of tokens it has for that branch.
    """

    generation: int
    requests: list[int]
    branches: list[int]
    positions: list[int]
    tokens: list[int]
    logprobs: list[float]  # of the chosen token, as StepResult.logprobs
    finishes: list[int]  # FINISH_*
    alternatives: list[list[tuple[int, float]] | None] | None = None  # top_logprobs, best first
    # (request, prompt tokens that came from the prompt cache), once per request and generation, with its first token.
    # Only those above zero.
    cached: list[tuple[int, int]] = []
    prompts: list[PromptLogprobs] = []
    pooled: list[Pooled] = []

    @property
    def broken(self) -> bool:
        """What the model computed for some request are no numbers."""
        return FINISH_ABORT in self.finishes or any(one.vectors is None for one in self.pooled)


class Rejected(msgspec.Struct, tag="rejected"):
    """The scheduler will not run this request: its queue is full, it has waited too long, or it could never fit."""

    generation: int
    request: int
    reason: str  # "queue_full" | "queue_timeout" | "invalid"
    message: str
    retry_after: float | None = None


class Load(msgspec.Struct, tag="load"):
    """The scheduler's state, sent when it changed, at most a few times a second, and when it falls idle."""

    generation: int
    slots_total: int
    slots_used: int
    running: int  # branches in the running batch
    waiting: int  # branches not yet admitted
    paused: int  # branches that were admitted, then paused (replayed ones too)
    estimated_peak: float  # dynamic_max_load: the admission rule's worst need over slots_total
    queued_tokens: int = (
        0  # of prompts (of replayed requests, what they had emitted, too) that are still to be computed
    )


ToApi = StepOutput | Rejected | Load

LAST_PUSH = 2.0  # seconds that the last push of metrics may take

# --- supervisor -> child --------------------------------------------------------------------------------------


class EngineConfigure(msgspec.Struct, tag="engine-configure"):
    """First message to an engine rank."""

    plan: bytes  # a config.plan.Plan in MessagePack
    generation: int
    rank: int
    endpoint: str  # ZeroMQ endpoint that rank 0 binds; the ranks meet at `endpoints.meeting_path` of it
    metrics_dir: str
    metrics_id: str  # names its files there; no other living process has it
    ranks: int = 1  # processes of this generation
    device: int = 0  # index of this rank's GPU
    replica: int = 0  # which of the plan's groups of ranks this generation is one of
    revision: int = 1  # the plan's number, which names the socket of its visual worker


class ApiConfigure(msgspec.Struct, tag="api-configure"):
    """First message to an api worker. `listener_fds` are inherited, already bound and listening."""

    plan: bytes
    api: int
    epoch: int  # counts the starts of this api worker, from 1
    listener_fds: list[int]
    metrics_dir: str
    metrics_id: str  # names its files there; no other living process has it
    revision: int = 1  # the plan's number
    quota_fd: int | None = None  # inherited: the memory of `quota.Quota`; None: limits of keys are this process's own
    column: int = 0  # where this process counts there; no other living api worker has it
    store_dir: str = ""  # what all api workers share of the responses that are kept; empty: each keeps its own
    tls: Tls | None = None  # None: it serves HTTP
    visual_dir: str = ""  # where the sockets of visual workers are


class VisualConfigure(msgspec.Struct, tag="visual-configure"):
    """First message to a visual worker."""

    plan: bytes
    path: str  # of the Unix socket that it listens on
    secret: bytes  # of the daemon: see `ImageSpan.key`
    metrics_dir: str
    metrics_id: str  # names its files there; no other living process has it
    device: int | None = None  # index of the GPU that it encodes on; None: the CPU


class PushTarget(msgspec.Struct, tag="push-target"):
    """To the process that pushes metrics: where to from now on, and how often."""

    gateway: str  # host:port
    job: str
    grouping_key: dict[str, str]
    interval: float  # seconds
    user: str | None = None  # None: no authentication
    password: str | None = None


class PushConfigure(msgspec.Struct, tag="push-configure"):
    """First message to the process that pushes metrics."""

    target: PushTarget
    metrics_dir: str  # what is pushed
    metrics_id: str  # names its own files there; no other living process has it
    log_level: str


class EngineUp(msgspec.Struct, tag="engine-up"):
    """Generation `generation` is ready; connect to it, replay what is held, send what is new."""

    generation: int
    endpoint: str
    revision: int = 1  # the plan that it serves
    replica: int = 0  # its number among those that serve it side by side; generations of one number follow each other


class EngineDown(msgspec.Struct, tag="engine-down"):
    """Generation `generation` is dead or asleep. Close its socket first, then move what was in flight there to another
    one of the same revision, or hold it where there is none."""

    generation: int
    cause: str  # in words
    unproven: list[int]  # requests that had been admitted and had no token since; from the flight record
    # The one of them that ran alone right after the engine had answered a request of its own, if the death may be its
    # doing; 0: no request did, or the cause certainly came from outside.
    quarantined: int = 0
    outside: bool = False
    revision: int = 1


class Health(msgspec.Struct, tag="health"):
    """What /health and /readiness answer until the next such message."""

    ready: bool
    reason: str
    retry_after: float = 5.0


class WorkerSeen(msgspec.Struct, frozen=True):
    """One child process, or the place of one that will be started again."""

    name: str  # "api-0", "engine-0"
    state: str  # as snapshot.WorkerStatus: "starting" | "running" | "backoff" | "stopping" | "exited" | "fatal"
    said: str  # where it has got to, for people
    restarts: int
    ready: bool  # it is in service


class Overview(msgspec.Struct, tag="overview", frozen=True):
    """To an api worker that shows a page: what it can't know of the daemon by itself. Sent when it changed, at most
    once a second and before each `Health`."""

    started: float  # Unix time of the daemon's start
    sentence: str  # the daemon's state, for people
    tokens_per_second: float  # generated by the engine in force, over the last seconds
    # Over all api workers, as snapshot.Requests. The first two are now, the others since the daemon's start.
    in_flight: int
    held: int
    ok: int
    cancelled: int
    failed: int
    resumed: int
    workers: list[WorkerSeen]


class ApiGone(msgspec.Struct, tag="api-gone"):
    """To the engine: every request of this api worker's epoch is to be aborted, its output dropped."""

    api: int
    epoch: int


class Drain(msgspec.Struct, tag="drain"):
    """Refuse new requests with 503, let those in flight finish. `Resume` undoes it."""


class Resume(msgspec.Struct, tag="resume"):
    """To an api worker: accept new requests again."""


class Retire(msgspec.Struct, tag="retire"):
    """To an api worker that is being replaced: stop accepting, finish what is in flight, then exit 0."""


class Prepare(msgspec.Struct, tag="prepare"):
    """To an api worker: revision `revision` is on its way. Get ready to serve it beside the one in force (tokenizer,
    limits, ledger), then say `Prepared`. Its `EngineUp` may come before or after that."""

    revision: int
    plan: bytes


class Commit(msgspec.Struct, tag="commit"):
    """To an api worker: from now on new requests belong to `revision`, which is prepared. What is in flight of the one
    before it stays there until it ends, or, with `carry` (the same model goes on), is replayed on the new one."""

    revision: int
    carry: bool = False


class Forget(msgspec.Struct, tag="forget"):
    """To an api worker: `revision`, which is not in force, is given up or gone. Requests that it still has end with
    `reason`: as a finish reason where text was sent, else as an error."""

    revision: int
    reason: str


class Cut(msgspec.Struct, tag="cut"):
    """To an api worker: end the requests of `revision` with `reason`, as a finish reason where text was sent, else as
    an error. The revision itself stays."""

    revision: int
    reason: str


class Hold(msgspec.Struct, tag="hold"):
    """To an api worker: new requests wait (bounded by max_held and hold_timeout) before anything of a model is used;
    which one they meet is known after `Release`."""


class Release(msgspec.Struct, tag="release"):
    """Ends `Hold`: what waited goes to the revision in force now."""


class Models(msgspec.Struct, tag="models"):
    """To an api worker: the names of `[models]`. Empty: any name that a request gives is taken."""

    names: list[str]


class Probe(msgspec.Struct, tag="probe"):
    """To an api worker: run one token on the revision in force as a request of your own, then say `Probed`."""

    number: int
    generation: int | None = None  # where; None: on any


class Tune(msgspec.Struct, tag="tune"):
    """Live settings changed."""

    log_level: str
    log_stats_interval: float  # seconds; inf: none
    stop_timeout: float  # seconds


class Keys(msgspec.Struct, tag="keys"):
    """To an api worker: the API keys in force from now on."""

    ring: bytes  # a config.keys.KeyRing in MessagePack


class Tls(msgspec.Struct, tag="tls"):
    """To an api worker: what new connections are served with from now on, as `config.tls.TlsPair`, and no other process
    gets. It changes no worker between HTTP and HTTPS."""

    certificate: bytes
    key: bytes
    client_ca: bytes
    expires: float
    broken: bool = False  # the files hold another pair by now, which can't be used

    def __repr__(self) -> str:
        return f"Tls(until {self.expires})"


class Stage(msgspec.Struct, tag="stage"):
    """To an engine: keep a copy of the weights in host memory, made while requests are served. Its progress is
    ``stats["staged_bytes"]`` of ``stats["staged_total"]``; -1: host memory can't hold it. Ignored unless it's ready."""


class Sleep(msgspec.Struct, tag="sleep"):
    """To an engine whose requests, if it has any, are held elsewhere: give the device's memory back. The phases
    "sleep", in which a copy of the weights that was begun is finished, and "asleep" follow. With `Stage` before it the
    weights stay in host memory (a CPU's too); without, they are read from their files again. Ignored unless it's
    ready."""


class Wake(msgspec.Struct, tag="wake"):
    """To an engine that sleeps: the phases "load", "warmup" and "ready" follow, at the same endpoint. One that is ready
    lets go of what it staged."""


class FlushCache(msgspec.Struct, tag="flush-cache"):
    """To an engine: forget the cached prompts that no request uses now."""


class Stop(msgspec.Struct, tag="stop"):
    """End now in good order: an api worker ends its streams with an error frame, the process that pushes metrics makes
    a last push within LAST_PUSH; exit 0."""


Down = (
    EngineConfigure
    | ApiConfigure
    | PushConfigure
    | VisualConfigure
    | PushTarget
    | EngineUp
    | EngineDown
    | Health
    | Overview
    | ApiGone
    | Drain
    | Resume
    | Retire
    | Prepare
    | Commit
    | Forget
    | Cut
    | Hold
    | Release
    | Models
    | Probe
    | Tune
    | Keys
    | Tls
    | Stage
    | Sleep
    | Wake
    | FlushCache
    | Stop
)

# --- child -> supervisor ------------------------------------------------------------------------------------


class Heartbeat(msgspec.Struct, tag="heartbeat"):
    """Sent through the same loop as the work, at least every half second.

    A child makes progress when `phase` or `progress` changed since its last heartbeat, or when it is not `busy`.
    Phases: "boot", "load", "warmup", "ready", "sleep", "asleep" for engines; "boot", "ready" for the others. "ready"
    of an engine means that it has produced a real token. A spare engine sends one, "boot", when all is done that it
    can do without a configuration.
    """

    phase: str
    progress: int  # grows with the work: bytes loaded, steps (or layers) run
    busy: bool = True
    total: int = 0  # what `progress` heads for, where known
    stats: dict[str, float] = {}


class Failed(msgspec.Struct, tag="failed"):
    """Said before an exit that the child foresaw; the supervisor's cause in words."""

    kind: str  # "config" | "device" | "memory" | "weights" | "changed" | "rank" (another one ended) | "error"
    message: str


class Prepared(msgspec.Struct, tag="prepared"):
    """An api worker's answer to `Prepare`."""

    revision: int
    error: str = ""  # why it can't be served; empty: it can


class Probed(msgspec.Struct, tag="probed"):
    """An api worker's answer to `Probe`."""

    number: int
    error: str = ""


Up = Heartbeat | Failed | Prepared | Probed

_encoder = msgspec.msgpack.Encoder()


def encode(message: Any) -> bytes:
    """Any of the structs above in MessagePack."""
    return _encoder.encode(message)


decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_api = msgspec.msgpack.Decoder(ToApi).decode
decode_down = msgspec.msgpack.Decoder(Down).decode
decode_up = msgspec.msgpack.Decoder(Up).decode
