"""What configuration and probing end in: plain, immutable, serialisable data that every child receives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from lightllmd.architecture.families import architecture_of
from lightllmd.architecture.family import Architecture
from lightllmd.architecture.outline import Outline
from lightllmd.architecture.prefixes import Prefixes
from lightllmd.architecture.vision import text_config, vision_of
from lightllmd.architecture.vision.spec import VisionSpec
from lightllmd.architecture.weight_schemes import ALL_DENSE, WeightSchemes
from lightllmd.config.parameters import Config, Params
from lightllmd.config.stamps import Stamp

STEP = "<extra_0>"  # what process-reward models have behind each step of a solution


class Pooling(msgspec.Struct, frozen=True):
    """How a checkpoint makes an embedding of a prompt's last hidden states."""

    kind: str  # "last" | "mean" | "cls": of the last token, of all, of the first one
    unit: bool  # each vector is divided by its length


class ModelFacts(msgspec.Struct, frozen=True):
    """Read by the probe child from file headers; no weight was loaded for it."""

    path: str  # resolved: a directory, or a .gguf file
    format: str  # "safetensors" | "gguf" | "deepspeed" | "dummy": random weights
    model_type: str  # Hugging Face name, e.g. "llama"
    hf_config: dict[str, Any]  # config.json, or what a GGUF header says in the same words
    files: list[str]  # weight files, absolute, in order; none of "dummy"
    weight_elements: int  # parameters stored (tied ones once)
    weight_bytes: int  # bytes in the files
    checkpoint_dtype: str | None  # "float16" | "bfloat16" | "float32"; None where the format names none
    context_length: int | None
    eos_ids: list[int]  # generation_config, config, chat end of turn; may be empty
    has_tokenizer: bool
    has_chat_template: bool
    remote_code: dict[str, str] = {}  # what runs of the checkpoint's own code: auto class -> "module.Class"
    step_token: int | None = None  # of a process-reward model: the tokenizer's id of what stands behind each step
    stamps: list[Stamp] = []  # of every file that any of this, or a tokenizer, was read from
    outline: Outline | None = None  # of a model that transformers' modules compute; None: one of our families
    headless: bool = False  # its files hold no language model head
    untied: bool = False  # they hold one although the decoder's config says that the embedding is one
    prefixes: Prefixes | None = None  # of their tensors' names; None: as the family has them
    # Of a model with vision: its image processor's settings; empty: the model's folder has none.
    preprocessor: dict[str, Any] = {}
    pooling: Pooling | None = None  # as sentence-transformers' settings beside it say; None: they don't
    pooling_refused: str = ""  # why what they say can't be done
    quantisation: dict[str, Any] = {}  # what the checkpoint says of how its matrices are stored; empty: they are dense
    quantised_as: str = ""  # the same in words
    schemes: WeightSchemes = ALL_DENSE  # what a quantised checkpoint's weights are stored by
    dequantised: list[str] = []  # its weights that are made dense while they are loaded, in words, and why
    sees: bool = False  # it has a vision tower

    @property
    def architecture(self) -> Architecture | Outline:
        """What the model is made of. Raises ConfigInvalid."""
        if self.outline is not None:
            return self.outline
        usual = architecture_of(self.model_type, self.hf_config)
        return usual.of_files(self.headless, self.prefixes or usual.prefixes, self.untied)

    @property
    def vision(self) -> VisionSpec | None:
        """How it sees images; None: it is a model of text. Raises ConfigInvalid."""
        return vision_of({**self.hf_config, "model_type": self.model_type}, self.preprocessor or None, self.prefixes)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The config of its decoder, a part of `hf_config` where it is a model with vision. Raises ConfigInvalid."""
        return text_config({**self.hf_config, "model_type": self.model_type})

    @property
    def weight_stamps(self) -> list[Stamp]:
        """Of the files that hold weights."""
        return [stamp for stamp in self.stamps if stamp.path in self.files]

    @property
    def text_stamps(self) -> list[Stamp]:
        """Of what the tokenizer is read from: all but weights, of a GGUF file its first part."""
        return [stamp for stamp in self.stamps if stamp.path not in self.files or stamp.path == self.path]


class Scoring(msgspec.Struct, frozen=True):
    """What a model gives instead of tokens: vectors, of the hidden states of some tokens of a prompt."""

    labels: list[str]  # of the values of each vector, in their order
    # "regression" | "single_label_classification" | "multi_label_classification", as the model's config says it.
    problem_type: str | None = None
    marker: int | None = None  # a vector is made at each token of this id; None: one, at the last token
    ending: int | None = None  # a token that ends each conversation
    raw_pairs: bool = False  # /score and /rerank tell the logit; else its sigmoid


class PromptEmbedding(msgspec.Struct, frozen=True):
    """The vectors that a model which doesn't score makes of prompts."""

    pooling: Pooling
    size: int  # values of a vector: the model's hidden size


class Device(msgspec.Struct, frozen=True):
    """One GPU, as the probe child found it."""

    index: int  # CUDA's: device "cuda:INDEX" of a process with the daemon's CUDA_VISIBLE_DEVICES
    name: str
    memory_total: int  # bytes
    memory_free: int  # bytes
    uuid: str = ""  # NVML's name for it, which stays the same over restarts and for other CUDA_VISIBLE_DEVICES
    bus_id: str = ""  # where it is plugged in, such as "00000000:19:00.0"
    capability: tuple[int, int] | None = None
    fast_dtypes: list[str] = []  # as `DeviceFacts.fast_dtypes`
    mig: bool = False  # it is a part of a GPU: a MIG instance
    fault: str = ""  # why it can't be used, though it is there; its index then means nothing

    @property
    def title(self) -> str:
        """What people know it by."""
        where = f" at {self.bus_id}" if self.bus_id else ""
        return f"{self.name}{where}" if self.fault else f"GPU {self.index} ({self.name}{where})"


class DeviceFacts(msgspec.Struct, frozen=True):
    """Read by the probe child. What is said of one device is said of the first one that can be used; a plan says there
    what is true of all that it uses: the least memory, and what the weakest one can do."""

    kind: str  # "cpu" | "cuda"
    name: str
    count: int  # usable devices of that kind (1 for a CPU)
    memory_total: int  # bytes
    memory_free: int  # bytes: what can be had now (MemAvailable on a CPU)
    fast_dtypes: list[str]  # dtypes this device multiplies at full speed, best first
    cpu_threads: int  # physical cores usable by this process
    capability: tuple[int, int] | None = None  # a GPU's compute capability
    devices: list[Device] = []  # all visible GPUs, also those that can't be used; empty for a CPU
    # The CUDA_VISIBLE_DEVICES that processes need for `Device.index` to mean what it says, where the daemon's own won't
    # do: a lost GPU keeps CUDA from starting. Empty: the daemon's.
    visible: str = ""
    no_gpu: str = ""  # of a CPU that is used because there is no usable GPU: why there is none
    host_free: int = 0  # bytes of host memory that can be had now, where the devices are GPUs; 0: not known

    @property
    def usable(self) -> list[Device]:
        """The GPUs that can be used; a CPU is one device."""
        if not self.devices:
            alike = Device(
                0,
                self.name,
                self.memory_total,
                self.memory_free,
                capability=self.capability,
                fast_dtypes=self.fast_dtypes,
            )
            return [msgspec.structs.replace(alike, index=index) for index in range(self.count)]
        return [device for device in self.devices if not device.fault]

    def of(self, devices: list[Device]) -> DeviceFacts:
        """Of these alone, some of `usable`: what is true of each of them."""
        scarcest = min(devices, key=lambda device: device.memory_free)
        return msgspec.structs.replace(
            self,
            name=devices[0].name,
            memory_total=scarcest.memory_total,
            memory_free=scarcest.memory_free,
            fast_dtypes=[dtype for dtype in devices[0].fast_dtypes if all(dtype in one.fast_dtypes for one in devices)],
            capability=min((one.capability for one in devices if one.capability), default=None),
        )

    def with_free(self, free: Callable[[Device], int]) -> DeviceFacts:
        """As if each device had so many bytes free."""
        devices = [msgspec.structs.replace(one, memory_free=max(0, free(one))) for one in self.devices]
        first = next((one for one in devices if not one.fault), None)
        own = max(0, free(self.usable[0])) if first is None else first.memory_free
        return msgspec.structs.replace(self, devices=devices, memory_free=own)


class Other(msgspec.Struct, frozen=True):
    """A model that may be swapped to, and that room is kept for beside the one that is planned."""

    params: Params
    model: ModelFacts | None = None
    fault: str = ""  # why there is no `model`


class Facts(msgspec.Struct, frozen=True):
    """The probe child's whole answer."""

    model: ModelFacts | None  # None with the fake backend
    device: DeviceFacts
    # By name; empty unless room was asked for. With their parameters, so that a plan that is made again from the same
    # facts divides the memory as the one before, whatever [models] says by then.
    others: dict[str, Other] = {}


class Derived(msgspec.Struct, frozen=True):
    """One value that `resolve` chose, and why."""

    name: str
    value: Any
    reason: str


SPARE_ROW, RESERVE_ROW = "spare engine", "reserve"
VISION_ROWS = ("vision weights", "vision activations", "vision runtime")


class BudgetRow(msgspec.Struct, frozen=True):
    """One purpose that memory is planned for."""

    name: str  # "weights" | "kv cache" | "activations" | "graphs" | "margin" | …
    bytes: int
    how: str  # the arithmetic in words


class Budget(msgspec.Struct, frozen=True):
    """Memory per device, planned before anything is loaded."""

    rows: list[BudgetRow]
    available: int  # bytes that the plan may use

    @property
    def needed(self) -> int:
        """Bytes of all rows."""
        return sum(row.bytes for row in self.rows)

    def row(self, name: str) -> int:
        """Bytes of that row; 0 where there is none."""
        return next((row.bytes for row in self.rows if row.name == name), 0)

    @property
    def spare(self) -> int:
        """Of `needed`, what the engine itself never takes: the context that the spare one makes beforehand."""
        return self.row(SPARE_ROW)

    @property
    def reserve(self) -> int:
        """Of `needed`, what stays free for another model beside this one."""
        return self.row(RESERVE_ROW)

    @property
    def vision(self) -> int:
        """Of `needed`, what the visual worker takes."""
        return sum(map(self.row, VISION_ROWS))

    @property
    def taken(self) -> int:
        """Of `needed`, what the engine itself takes."""
        return self.needed - self.spare - self.reserve - self.vision


class Vision(msgspec.Struct, frozen=True):
    """The visual worker, which all replicas share: what it encodes images to, where, and in how much memory."""

    data_type: str  # of embeddings: the engine's
    most_tokens: int  # of one image
    token_bytes: int  # of one token's embedding, with what further layers are given
    patches: int  # rows of the vision tower that memory is planned for: no more are encoded at a time
    capacity: int  # images whose embeddings are kept: cache_capacity, or as many as host memory has room for
    rows: list[BudgetRow] = []  # what it takes of its device; rows of that device's budget, too
    devices: list[int] = []  # the GPU; empty: the CPU

    @property
    def kept_bytes(self) -> int:
        """Of host memory, that so many of the largest images take."""
        return self.capacity * self.most_tokens * self.token_bytes


class Plan(msgspec.Struct, frozen=True):
    """A configuration with nothing left open. `config` keeps what was written; the fields below are in force."""

    config: Config
    model: ModelFacts | None
    device: DeviceFacts
    derived: list[Derived]
    budget: Budget
    # the resolved values of what may be "auto" or unset
    max_total_token_num: int
    batch_max_tokens: int
    eos_id: list[int]
    data_type: str  # "float16" | "bfloat16" | "float32"
    tokenizer_mode: str  # "slow" | "fast"
    log_stats_interval: float  # seconds
    vocab_size: int
    model_name: str  # what /get_model_name and /v1/models say
    config_file: str | None = None
    scoring: Scoring | None = None  # of a model that scores
    embedding: PromptEmbedding | None = None  # of any other
    vision: Vision | None = None  # where requests may bring images
    schemes: WeightSchemes = ALL_DENSE  # how weights are stored
    kv_scheme: str = "dense"  # how the KV cache is stored, a key of `architecture.kv_schemes`
    decode_kernel: str = "auto"  # the decode attention's mode on a GPU; "auto": the best for each shape
    warnings: list[str] = []  # about what is served otherwise than its words say
    ranks: int = 1  # of each replica: processes that the model is cut over (tp, or what degrade left of it)
    replicas: int = 1  # groups of ranks, each with the whole model (engine.replicas, or what degrade left of it)
    # Replica r's rank k computes on GPU ``devices[r * ranks + k]``, CUDA's index; empty where all are on the CPU.
    devices: list[int] = []
    device_budgets: list[Budget] = []  # of each of `devices`; empty where there is one, or all are on the CPU

    def device_of(self, replica: int, rank: int) -> int:
        """CUDA's index of the GPU that this rank computes on; 0 on a CPU."""
        return self.devices[replica * self.ranks + rank] if self.devices else 0

    def budget_of(self, replica: int, rank: int) -> Budget:
        """Of the device that this rank computes on; on a CPU of all ranks together."""
        return self.device_budgets[replica * self.ranks + rank] if self.device_budgets else self.budget

    def budgets_of(self, replica: int) -> dict[int, Budget]:
        """By the index of the device, what this replica's ranks take there; on a CPU, number 0, its share of what all
        take together."""
        if self.devices:
            return {self.device_of(replica, rank): self.budget_of(replica, rank) for rank in range(self.ranks)}
        rows = [msgspec.structs.replace(row, bytes=row.bytes // self.replicas) for row in self.budget.rows]
        return {0: Budget(rows, self.budget.available)}

    def rendezvous_port(self, replica: int) -> int:
        """TCP port where the ranks of this replica find each other, unless it is taken."""
        return self.config.params.nccl_port + replica

    @property
    def sees_both_ways(self) -> bool:
        """Tokens of an image attend to all of its tokens, so that it is fed whole."""
        sight = self.model.vision if self.vision is not None and self.model is not None else None
        return sight is not None and sight.bidirectional

    @property
    def image_layers(self) -> int:
        """Layers of an image embedding: the first one, and those for further layers of the decoder."""
        sight = self.model.vision if self.vision is not None and self.model is not None else None
        return 1 if sight is None else 1 + sight.deepstack

    @property
    def sees_in_grids(self) -> bool:
        """Rotary positions of images are those of a grid."""
        sight = self.model.vision if self.vision is not None and self.model is not None else None
        return sight is not None and sight.positions == "grid"

    @property
    def threads(self) -> int:
        """CPU threads of each rank: all that compute on one CPU share its cores."""
        together = self.config.engine.threads or self.device.cpu_threads
        return max(1, together // (self.ranks * self.replicas)) if self.device.kind == "cpu" else together

    @property
    def generates(self) -> bool:
        """The model makes tokens; else vectors are all that it gives."""
        return self.scoring is None and not (self.model is not None and self.model.headless)


def encode_plan(plan: Plan) -> bytes:
    """In MessagePack, as children get it."""
    return msgspec.msgpack.encode(plan)


def decode_plan(body: bytes) -> Plan:
    """What `encode_plan` made. Raises msgspec.MsgspecError for anything else."""
    return msgspec.msgpack.decode(body, type=Plan)
