"""Config and facts -> Plan: nothing stays open. A pure function, and a reason for each value it derives."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import PurePath
from typing import Any

import msgspec

from lightllmd.architecture.dtypes import ITEM_BYTES
from lightllmd.architecture.family import Architecture
from lightllmd.architecture.outline import Outline
from lightllmd.architecture.ranks import rank_faults
from lightllmd.architecture.spec import DecoderSpec
from lightllmd.architecture.vision.unbuilt import unbuilt
from lightllmd.config.amount import size
from lightllmd.config.bounds import DEVICE_HEAD_DIMS
from lightllmd.config.devices import Groups, asked_for, degraded, groups_of, imbalance, too_few, unlike
from lightllmd.config.load import problem_at
from lightllmd.config.models import name_of
from lightllmd.config.parameters import DATA_TYPES, Config
from lightllmd.config.plan import (
    STEP,
    Budget,
    BudgetRow,
    Derived,
    Facts,
    ModelFacts,
    Other,
    Plan,
    Pooling,
    PromptEmbedding,
    Scoring,
    Vision,
)
from lightllmd.config.quantisation import Quantisation
from lightllmd.config.rank_budget import CoResidentNeeds
from lightllmd.config.report import budget_table, report
from lightllmd.config.shares import shares
from lightllmd.config.slots import Fitting, NoRoom
from lightllmd.config.value import Value, batch_max_tokens
from lightllmd.config.vision_budget import VisionNeeds
from lightllmd.errors import ConfigInvalid, Problem

__all__ = ["budget_table", "located", "report", "resolve"]

FALLBACK_SLOTS, FALLBACK_EOS, FALLBACK_DATA_TYPE = 6000, [2], "float16"  # where "auto" can't know better
BUILT_IN_STATS_INTERVAL = 10.0  # seconds
STEP_ID = 151651  # of STEP in Qwen2.5's vocabulary
FAKE_VOCABULARY, FAKE_EOS = 257, 256  # bytes, and one id to end with
FAKE_EMBEDDINGS = "float32"  # of images


def resolve(config: Config, facts: Facts, config_file: str | None = None) -> Plan:
    """Raises ConfigInvalid; where something does not fit, its problem names the value that would."""
    maker = _Fake(config, facts, config_file) if facts.model is None else _Real(config, facts, config_file, facts.model)
    return maker.plan()


def located(problems: list[Problem], config: Config, config_file: str | None) -> list[Problem]:
    """Problems that were found outside (by the probe), put where their key was written."""
    return [problem_at(config, config_file, (problem.key,), problem.message) for problem in problems]


class _Maker(ABC):
    """What real and fake plans share: the values in force, their reasons, the problems."""

    def __init__(self, config: Config, facts: Facts, config_file: str | None) -> None:
        self.config, self.params = config, config.params
        self.facts = facts
        tp, replicas = asked_for(config)
        device = facts.device
        # Those that are used, or where there are too few all.
        self.device = device if device.kind == "cpu" else device.of(device.usable[: tp * replicas])
        self.config_file = config_file
        self.derived: list[Derived] = []
        self.problems: list[Problem] = []
        self.short_of: tuple[int, int] | None = None  # bytes needed and to be had, of a problem with memory

    def derive(self, name: str, value: Value) -> Any:
        """The value in force, noted with its reason if it has one."""
        if value.reason:
            self.derived.append(Derived(name, value.value, value.reason))
        return value.value

    def problem(self, message: str, *keys: str) -> None:
        self.problems.append(problem_at(self.config, self.config_file, keys, message))

    def stop_if_problems(self) -> None:
        if self.problems:
            raise ConfigInvalid(self.problems, self.short_of if len(self.problems) == 1 else None)

    @abstractmethod
    def rank_faults(self, count: int) -> list[str]:
        """Why so many ranks can't share the model; nothing if they can."""

    @cached_property
    def groups(self) -> Groups:
        """Ranks and replicas in force. Raises ConfigInvalid where they can't be had."""
        lacking = list(too_few(self.config, self.facts.device))
        if lacking and self.config.engine.degrade:
            left = degraded(self.config, self.facts.device, lambda count: not self.rank_faults(count))
            if left is not None:
                return left
        for keys, message in lacking:
            self.problem(message, *keys)
        tp, replicas = asked_for(self.config)
        for message in self.rank_faults(tp):
            self.problem(message, "tp")
        self.stop_if_problems()
        return groups_of(self.facts.device, tp, replicas)

    def model_name(self, of_path: str) -> str:
        """The one that clients know the model by. `of_path`: its file's or folder's, for one without another."""
        name = self.config.http.served_model_name or name_of(self.config)
        if name:
            return name
        if of_path not in self.config.models or self.params.model_dir is None:
            return of_path
        why = f"[models.{of_path}] is another model; http.served_model_name gives this one a name"
        return str(self.derive("model name", Value(self.params.model_dir, why)))

    def log_stats_interval(self) -> Value:
        if self.params.log_stats_interval > 0:
            return Value(self.params.log_stats_interval)
        return Value(BUILT_IN_STATS_INTERVAL, "log_stats_interval = 0 means the built-in pace")


# --- the fake engine --------------------------------------------------------------------------------------------


class _Fake(_Maker):
    def rank_faults(self, count: int) -> list[str]:
        return []

    def plan(self) -> Plan:
        params = self.params
        eos = Value([FAKE_EOS], "the fake engine's") if params.eos_id == "auto" else Value(list(params.eos_id))
        slots = self._slots()
        fake = self.config.engine.fake
        return Plan(
            config=self.config,
            model=None,
            device=self.device,
            max_total_token_num=self.derive("max_total_token_num", slots),
            batch_max_tokens=self.derive("batch_max_tokens", batch_max_tokens(self.params)),
            eos_id=self.derive("eos_id", eos),
            data_type=DATA_TYPES.get(params.data_type, "float32" if params.data_type == "auto" else params.data_type),
            tokenizer_mode="fast",
            log_stats_interval=self.derive("log_stats_interval", self.log_stats_interval()),
            vocab_size=FAKE_VOCABULARY,
            model_name=self.model_name(_last_component(params.model_dir or "fake")),
            config_file=self.config_file,
            ranks=self.groups.ranks,
            replicas=self.groups.replicas,
            devices=[device.index for device in self.groups.devices],
            scoring=self._scoring(),
            embedding=None if params.use_reward_model else PromptEmbedding(self._pooling(), fake.embedding_size),
            vision=self._vision(),
            derived=self.derived,
            budget=Budget([BudgetRow("weights", fake.load_bytes, "pretended")], self.device.memory_free),
        )

    def _scoring(self) -> Scoring | None:
        fake = self.config.engine.fake
        if not self.params.use_reward_model:
            return None
        marker = None if fake.score_marker < 0 else fake.score_marker
        return Scoring([f"LABEL_{number}" for number in range(fake.score_labels)], marker=marker)

    def _vision(self) -> Vision | None:
        if not self.params.enable_multimodal:
            return None
        fake = self.config.engine.fake
        each = fake.embedding_size * ITEM_BYTES[FAKE_EMBEDDINGS]
        return Vision(FAKE_EMBEDDINGS, fake.image_tokens, each, fake.image_tokens, self.params.cache_capacity)

    def _pooling(self) -> Pooling:
        written = self.config.engine.pooling
        return Pooling("last" if written == "auto" else written, unit=True)

    def _slots(self) -> Value:
        if self.params.max_total_token_num != "auto":
            return Value(self.params.max_total_token_num)
        slots = max(FALLBACK_SLOTS, self.params.max_req_total_len + 1)
        return Value(slots, "the fake engine has no memory to measure")


# --- a model ------------------------------------------------------------------------------------------------------


class _Real(_Maker):
    def __init__(self, config: Config, facts: Facts, config_file: str | None, model: ModelFacts) -> None:
        super().__init__(config, facts, config_file)
        self.model = model
        self.co_residents: tuple[CoResidentNeeds, ...] = ()

    def sight(self, data_type: str) -> VisionNeeds | None:
        """What images take; None where none are served."""
        spec = self.model.vision if self.params.enable_multimodal and self.model.sees else None
        return None if spec is None else VisionNeeds(spec, data_type)

    @property
    def _sees_on(self) -> str:
        """Where images are encoded: "cuda" or "cpu"."""
        return self.device.kind if self.config.images.device == "auto" else "cpu"

    @cached_property
    def architecture(self) -> Architecture | Outline:
        """As this device computes it. Raises ConfigInvalid."""
        made = self.model.architecture
        return made.padded(DEVICE_HEAD_DIMS) if isinstance(made, Outline) and self.device.kind == "cuda" else made

    @property
    def spec(self) -> DecoderSpec | Outline:
        """Raises ConfigInvalid."""
        return self.architecture if isinstance(self.architecture, Outline) else self.architecture.spec

    @cached_property
    def quantisation(self) -> Quantisation:
        """Raises ConfigInvalid."""
        return Quantisation(self.config, self.model, self.architecture, self.device)

    def plan(self) -> Plan:
        self._check()
        vocab = self.spec.vocab
        self.derive("backend", self._backend())
        self._derive_remote_code()
        self.derive("device", self._device())
        data_type = self.derive("data_type", self._data_type())
        self.derived += self.quantisation.derived()
        eos_id = self.derive("eos_id", self._eos_id(vocab))
        batch = self.derive("batch_max_tokens", batch_max_tokens(self.params))
        self._derive_groups()
        self.co_residents = tuple(self._co_residents())
        fitting = self._fitting(data_type)
        slots = self._slots(fitting)
        budgets = fitting.own_needs.budgets(slots.value)
        return Plan(
            config=self.config,
            model=self.model,
            device=self.device,
            max_total_token_num=self.derive("max_total_token_num", slots),
            batch_max_tokens=batch,
            eos_id=eos_id,
            data_type=data_type,
            tokenizer_mode=self.derive("tokenizer_mode", self._tokenizer_mode()),
            log_stats_interval=self.derive("log_stats_interval", self.log_stats_interval()),
            vocab_size=vocab,
            model_name=self.model_name(self._name()),
            config_file=self.config_file,
            ranks=self.groups.ranks,
            replicas=self.groups.replicas,
            devices=[device.index for device in self.groups.devices],
            derived=self.derived,
            budget=max(budgets, key=lambda budget: budget.needed - budget.available),
            device_budgets=budgets if len(budgets) > 1 else [],
            scoring=self._scoring(),
            embedding=self._embedding(),
            vision=self._vision(data_type),
            schemes=self.quantisation.schemes,
            kv_scheme=self.quantisation.kv_scheme,
            decode_kernel=self.quantisation.decode_kernel,
            warnings=[*self.quantisation.warnings(), *self._warnings(slots)],
        )

    def rank_faults(self, count: int) -> list[str]:
        return rank_faults(self.architecture, self.quantisation.schemes, count)

    def _fitting(self, data_type: str) -> Fitting:
        return Fitting(
            self.config,
            self.architecture,
            self.device,
            data_type,
            self.quantisation,
            self.groups,
            lambda count: not self.rank_faults(count),
            self.co_residents,
            self._beside(data_type),
            0 if (needs := self.sight(data_type)) is None else needs.token_bytes,
        )

    def _beside(self, data_type: str) -> tuple[BudgetRow, ...]:
        """Of the visual worker, on the engine's device."""
        needs = self.sight(data_type)
        if needs is None or self._sees_on != self.device.kind:
            return ()
        return tuple(needs.rows(self.config, self.device.kind))

    def _vision(self, data_type: str) -> Vision | None:
        needs = self.sight(data_type)
        if needs is None:
            return None
        devices = [self.groups.devices[0].index] if self._sees_on == "cuda" else []
        vision = Vision(
            data_type,
            needs.most_tokens,
            needs.token_bytes,
            needs.patches(self.config.images.batch),
            self._kept_images(needs),
            needs.rows(self.config, self._sees_on),
            devices,
        )
        each, kept = size(needs.image_bytes), size(vision.kept_bytes)
        how = (
            f"{self.model.model_type}: up to {needs.most_tokens} tokens and {each} an image, encoded on the "
            f"{'GPU' if devices else 'CPU'}; {vision.capacity} are kept, in up to {kept} of host memory"
        )
        self.derive("images", Value(True, how))
        return vision

    def _kept_images(self, needs: VisionNeeds) -> int:
        """Raises ConfigInvalid."""
        written, device = self.params.cache_capacity, self.device
        free = device.memory_free if device.kind == "cpu" else device.host_free
        if not free:
            return written
        fit, key = needs.kept(free), "cache_capacity"
        what = (
            f"the largest images take {size(needs.image_bytes)} each, and half of the host's {size(free)} may be used"
        )
        if fit >= written:
            return written
        if key in self.config.places or not fit:
            self.problem(f"{key} = {written}: {what}; at most {key} = {fit} fits", key)
            self.stop_if_problems()
        return int(self.derive(key, Value(fit, f"{what}, which is less than {written} of them")))

    def _slots(self, fitting: Fitting) -> Value:
        """Raises ConfigInvalid."""
        try:
            return fitting.slots()
        except NoRoom as short:
            self.short_of = short.needed, short.available
            self.problem(short.message, *short.keys)
            self.stop_if_problems()
            raise

    def _derive_groups(self) -> None:
        """What each rank has of the model."""
        groups = self.groups
        if groups.ranks > 1 and isinstance(self.architecture, Architecture):
            self.derive(
                "ranks", Value(groups.ranks, shares(self.architecture, self.quantisation.schemes, groups.ranks))
            )
        if groups.replicas > 1:
            where = "each on GPUs of its own" if groups.devices else "on one CPU"
            self.derive("replicas", Value(groups.replicas, f"{where}, with a KV cache of max_total_token_num each"))

    def _warnings(self, slots: Value) -> Iterator[str]:
        """Of what is lost, and of devices that differ."""
        written = self.params.max_total_token_num
        for lost in self.groups.lost:
            less = "" if written == "auto" or slots.value == written else f", with {slots.value} of {written} KV slots"
            yield lost + less
        yield from filter(None, (imbalance(self.groups.devices), self.groups.ranks > 1 and unlike(self.groups.devices)))

    def co_resident(self, name: str) -> CoResidentNeeds:
        """What it takes beside another model. Raises ConfigInvalid where it can't be served at all."""
        self._check()
        fitting = self._fitting(self._data_type().value)
        most = self._slots(fitting).value
        least = self.params.max_req_total_len + 1 if self.params.max_total_token_num == "auto" else most
        devices = tuple(device.index for device in self.groups.devices) or (0,)
        return CoResidentNeeds(name, fitting.own_needs, devices, least, most)

    def _co_residents(self) -> Iterator[CoResidentNeeds]:
        """Of those that can't be served nothing is kept: it is said, and the others have to do without them."""
        for name, other in self.facts.others.items():
            try:
                yield self._co_resident(name, other)
            except ConfigInvalid as invalid:
                fault = "; ".join(problem.message for problem in invalid.problems)
                self.derive(f"room for {name}", Value(0, f"none beside this model: {fault}"))

    def _co_resident(self, name: str, other: Other) -> CoResidentNeeds:
        if other.model is None:
            raise ConfigInvalid([Problem("model_dir", other.fault)])
        config = msgspec.structs.replace(self.config, params=other.params)
        return _Real(config, Facts(other.model, self.facts.device), self.config_file, other.model).co_resident(name)

    def _check(self) -> None:
        """What the probe lets through can be served by itself; here it's whether this configuration can. Raises
        ConfigInvalid where it can't, whatever memory there is."""
        self._check_context()
        self._check_rotations()
        self._check_mode()
        self._check_scoring()
        self._check_pooling()
        self._check_vision()
        self.stop_if_problems()
        if self.device.kind == "cuda":
            self._check_heads()

    def _check_heads(self) -> None:
        """What the kernels of a GPU are made for."""
        attention = self.spec.attention
        for head_dim in sorted({each.head_dim for each in attention}.difference(DEVICE_HEAD_DIMS)):
            known = ", ".join(map(str, DEVICE_HEAD_DIMS))
            self.problem(f"{self.model.path}: head_dim {head_dim}: a GPU takes {known}", "model_dir")
        if len({(each.heads, each.kv_heads, each.head_dim) for each in attention}) > 1:
            self.problem(f"{self.model.path}: layers with heads of different shapes: a GPU takes one", "model_dir")

    def _check_scoring(self) -> None:
        """What a model gives is its own; the parameter says what is expected."""
        named = ", ".join(map(str, self.model.hf_config.get("architectures") or ["...ForCausalLM"]))
        scored = self.architecture.scored
        if scored is None and self.params.use_reward_model:
            self.problem(
                f"use_reward_model = true, but {self.model.path} is a model that generates ({named}): it has no head "
                "that scores",
                "use_reward_model",
            )
        if scored is not None and not self.params.use_reward_model:
            self.problem(
                f"{self.model.path} is a model that scores ({named}): it can't generate, and is served with "
                "use_reward_model = true",
                "model_dir",
            )
        if scored is not None and scored.steps and self._marker() is None:
            self.problem(f"{self.model.path}: its tokenizer has no {STEP}, behind which it scores steps", "model_dir")

    def _marker(self) -> int | None:
        """The token that a process-reward model is read at."""
        scored, vocab = self.architecture.scored, self.spec.vocab
        if scored is None or not scored.steps:
            return None
        known = STEP_ID if self.model.step_token is None and not self.model.has_tokenizer else self.model.step_token
        return known if known is not None and known < vocab else None

    def _scoring(self) -> Scoring | None:
        scored = self.architecture.scored
        if scored is None:
            return None
        return Scoring(list(scored.labels), scored.problem_type, self._marker(), scored.ending, scored.raw_pairs)

    def _embedding(self) -> PromptEmbedding | None:
        if self.architecture.scored is not None:
            return None
        written, own = self.config.engine.pooling, self.model.pooling
        unit = own is None or own.unit
        kind = "last" if written == "auto" else written
        if written == "auto" and own is not None:
            kind = self.derive("engine.pooling", Value(own.kind, "the model's own settings for embeddings"))
        return PromptEmbedding(Pooling(kind, unit), self.spec.hidden)

    def _check_pooling(self) -> None:
        if self.model.pooling_refused and self.config.engine.pooling == "auto" and self.architecture.scored is None:
            self.problem(
                f'{self.model.pooling_refused}; [engine] pooling = "last", "mean" or "cls" takes no account of that',
                "model_dir",
            )

    def _check_vision(self) -> None:
        sees = self.model.sees
        if self.params.enable_multimodal is True and (fault := unbuilt(self.model.hf_config)):
            self.problem(
                f"{self.model.path}: {fault}; enable_multimodal = false serves its text",
                "enable_multimodal",
            )
        elif self.params.enable_multimodal is True and not sees:
            self.problem(
                f"enable_multimodal = true, but {self.model.path} is a model of text ({self.model.model_type})",
                "enable_multimodal",
            )
        if self.params.enable_multimodal and sees and self.model.outline is not None:
            self.problem(
                f"{self.model.path}: images of models that transformers computes are not available; "
                'engine.backend = "lightllmd" or enable_multimodal = false works',
                "enable_multimodal",
            )

    def _check_mode(self) -> None:
        for fault in self.quantisation.faults():
            self.problem(fault.message, *fault.keys)

    def _check_context(self) -> None:
        total, context = self.params.max_req_total_len, self.model.context_length
        if context is None or total == context:
            return
        if total > context:
            self.problem(
                f"max_req_total_len = {total} is above the model's context of {context} tokens; "
                f"write max_req_total_len = {context} and a smaller max_req_input_len",
                "max_req_total_len",
            )
        self.derive("context", Value(total, f"context {total} of the model's {context} (max_req_total_len)"))

    def _check_rotations(self) -> None:
        """Keys that were rotated for one prompt's length are wrong for another's; transformers' modules would rotate
        all sequences of a step for the longest."""
        spec, total = self.spec, self.params.max_req_total_len
        if isinstance(spec, Outline):
            if spec.longest is not None and total > spec.longest:
                self.problem(
                    f"max_req_total_len = {total}: beyond {spec.longest} tokens the rotary angles of this model depend "
                    "on a sequence's length, which the transformers back end does not compute; max_req_total_len = "
                    f"{spec.longest} or less works",
                    "max_req_total_len",
                )
            return
        if not self.params.use_dynamic_prompt_cache or spec.positions.kind != "dynamic":
            return
        context = spec.positions.original_context
        if total > context:
            self.problem(
                "use_dynamic_prompt_cache: this model's rope scaling is dynamic: beyond "
                f"{context} tokens what it caches of a prompt depends on the whole prompt's length; "
                f"max_req_total_len = {context} or less works",
                "use_dynamic_prompt_cache",
            )

    def _backend(self) -> Value:
        written, outline = self.config.engine.backend, self.model.outline
        if written != "auto" or outline is None:
            return Value(written)
        kind = self.model.model_type
        why = "brings its own code" if self.model.remote_code else f"is of no family that lightllmd computes: {kind}"
        return Value("transformers", f"{outline.architecture}; the model {why}")

    def _derive_remote_code(self) -> None:
        """What becomes of the code that the checkpoint names; of its tokenizer `_tokenizer_mode` tells."""
        for role, reference in self.model.remote_code.items():
            if role == "AutoConfig":
                self.derive(role, Value(reference, "completes config.json, in a process of its own"))
            elif role == "custom_generate":
                self.derive(role, Value(reference, "is not used: tokens are drawn as requests say"))
            elif role == "AutoModelForCausalLM" and self.model.outline is not None:
                self.derive(role, Value(reference, "runs in the engine"))
            elif role != "AutoTokenizer":
                why = "" if self.model.outline else f": {self.model.model_type} is built in"
                self.derive(role, Value(reference, f"is not used{why}"))

    def _device(self) -> Value:
        if self.config.engine.device != "auto":
            return Value(self.config.engine.device)
        found = f"{self.device.name}, {size(self.device.memory_free)} free"
        none = self.device.no_gpu or "no usable GPU"
        return Value(self.device.kind, found if self.device.kind == "cuda" else f"{none}; {found}")

    def _data_type(self) -> Value:
        written = self.params.data_type
        if written != "auto":
            return Value(DATA_TYPES.get(written, written))
        native, fast = self.model.checkpoint_dtype, self.device.fast_dtypes
        only = self.quantisation.data_type()
        if only is not None:
            wanted, name = only
            if self.device.kind == "cuda" or wanted in fast:
                return Value(wanted, f"mode {name} computes in nothing else")
            how = f"mode {name} computes in {wanted} on a GPU; this CPU is slow at it and fast at {', '.join(fast)}"
            return Value(native if native in fast else fast[0], how)
        wanted = native or FALLBACK_DATA_TYPE
        reason = "the checkpoint's own" if native else f"the checkpoint names none, so {FALLBACK_DATA_TYPE}"
        if wanted in fast:
            return Value(wanted, reason)
        where = "this CPU" if self.device.kind == "cpu" else self.device.name
        return Value(fast[0], f"{reason}; but {where} is slow at {wanted} and fast at {', '.join(fast)}")

    def _eos_id(self, vocab: int) -> Value:
        written = self.params.eos_id
        if written == "auto":
            if self.model.eos_ids:
                return Value(self.model.eos_ids, "named by the model")
            return Value(FALLBACK_EOS, "the model names none")
        beyond = [str(eos) for eos in written if eos >= vocab]
        if beyond:
            self.problem(f"{', '.join(beyond)} is not in the model's vocabulary of {vocab} tokens", "eos_id")
        return Value(list(written))

    def _tokenizer_mode(self) -> Value:
        if not self.model.has_tokenizer:
            return Value("fast", "no tokenizer files: text is token ids in decimal")
        if own := self.model.remote_code.get("AutoTokenizer"):
            mode = "slow" if self.params.tokenizer_mode == "slow" else "fast"
            return Value(mode, f"the checkpoint's own {own}, in a process of its own")
        if self.params.tokenizer_mode != "auto":
            return Value(self.params.tokenizer_mode)
        return Value("fast", "auto: exact, and the faster one")

    def _name(self) -> str:
        path = PurePath(self.model.path)
        return re.sub(r"-\d{5}-of-\d{5}$", "", path.stem) if path.suffix == ".gguf" else path.name


def _last_component(model_dir: str) -> str:
    return PurePath(model_dir.removeprefix("package:")).name or model_dir
