"""The engine without the daemon, for batch jobs and benchmarks::

    from lightllmd import LLM

    with LLM("/srv/models/llama-3.1-8b-instruct", max_req_total_len=4096) as llm:
        for output in llm.generate(["The capital of France is"], max_new_tokens=16):
            print(output.text)

Parameters, plan, scheduler, step loop and runner are those of the daemon's engine, in this process and this thread;
a request's fields mean what they mean to the native HTTP API. With ``tp=N`` this process is rank 0, and the other ranks
are child processes, which end with it.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Self

from lightllmd.config.load import load, nearest_key
from lightllmd.config.parameters import Config
from lightllmd.config.plan import Plan
from lightllmd.config.report import budget_table
from lightllmd.config.resolve import resolve
from lightllmd.config.setting import by_key
from lightllmd.engine.backends import runner_for, scheduler_for
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.ranks.children import ChildRanks
from lightllmd.engine.ranks.leading import LeadingRunner
from lightllmd.engine.ranks.member import Member
from lightllmd.errors import ConfigInvalid, EngineError, InvalidRequest, Problem, RankGone
from lightllmd.ipc.messages import StepOutput, Submit
from lightllmd.observe.progress import LoadBar, RequestBar
from lightllmd.offline_images import OfflineSeen, OfflineSight
from lightllmd.offline_jobs import (
    Embedded,
    Generated,
    OfflineJob,
    Output,
    Scored,
    ScoreJob,
    chat_jobs,
    open_jobs,
    pooling_jobs,
)
from lightllmd.probe.facts import Request, probe
from lightllmd.requests.intake import Intake
from lightllmd.requests.limits import RequestLimits
from lightllmd.requests.text_work import Inline
from lightllmd.text.interface import Tokenizer
from lightllmd.text.tokenizer import load_tokenizer

__all__ = ["LLM", "Embedded", "Generated", "Output", "Scored"]

PLACE = "LLM"  # where problems of the parameters are said to be
Job = OfflineJob | ScoreJob
OWNER = (0, 1)  # api worker and epoch in the scheduler's books: there is only this one


class LLM:
    """A loaded model with the engine that runs it. Not thread-safe: one call at a time.

    `parameters` are the documented ones by name (``max_total_token_num=100_000``, ``mode=[…]``, ``tp=2``) and the
    settings of the [engine] table, as ``engine={"device": "cpu"}`` or, since no documented parameter has the name of
    one, flat: ``device="cpu"``. Those that concern only the HTTP server are checked and have no effect.

    `progress`: a bar while the weights load, where standard error is a terminal.

    Raises ConfigInvalid with all its problems, NoUsableDevice, WeightsInvalid, OutOfMemory. On a CPU the number of
    torch's threads is set for the whole process.
    """

    plan: Plan  # every value in force, the reasons of those that were derived, and the memory budget

    def __init__(
        self, model_dir: str | os.PathLike[str] | None = None, *, progress: bool = True, **parameters: Any
    ) -> None:
        self._start(_plan(model_dir, parameters), progress)

    @classmethod
    def of(cls, config: Config, *, progress: bool = True) -> Self:
        """Of a configuration file, say: what `lightllmd` would serve with it. Raises as the constructor does."""
        llm = cls.__new__(cls)
        llm._start(_resolved(config), progress)
        return llm

    def _start(self, plan: Plan, progress: bool) -> None:
        self.plan = plan
        self._ranks = ChildRanks(plan) if plan.ranks > 1 else None
        try:
            with self._blaming():
                make = partial(runner_for, self.plan)
                self._runner = self._ranks.lead(make) if self._ranks else make(Member(device=plan.device_of(0, 0)))
                with LoadBar(self.plan.model_name, progress) as bar:
                    self._runner.load(self.plan, bar.update)
                self._runner.prepare(self._beat)
        except BaseException:
            self._end_ranks()
            raise
        self._sight = OfflineSight(self.plan) if self.plan.vision and self.plan.model else None
        if self._sight is not None:
            self._sight.load()
        self._scheduler = scheduler_for(self.plan, generation=1)
        self._loop = StepLoop(self._scheduler, self._runner)
        inline = Inline(lambda: self.tokenizer, RequestLimits.of(self.plan))
        self.intake = Intake(self.plan, lambda: self.tokenizer, inline, self._sight)
        self._jobs: dict[int, Job] = {}  # in the engine now, by request number
        self._numbers = 0  # the newest request's
        self._unusable = ""  # why nothing can be generated any more

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read when it is first needed: token ids in and out need none. Raises ConfigInvalid."""
        return load_tokenizer(self.plan)

    def memory_report(self) -> str:
        """The memory budget as a table, one row a line, and what was measured of it."""
        self._check_usable()
        measured = [f"  {name}  {value / 1e6:,.0f} MB" for name, value in self._runner.memory_stats().items()]
        return "\n".join([budget_table(self.plan), *(["measured:", *measured] if measured else [])])

    # --- generation ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        prompt_token_ids: Sequence[Sequence[int]] | None = None,
        images: Sequence[Any] | None = None,
        parameters: Sequence[Mapping[str, Any]] | None = None,
        detokenize: bool = True,
        progress: bool = True,
        max_running: int | None = None,
        **sampling: Any,
    ) -> list[Output]:
        """Continues every prompt; outputs are in the prompts' order. Lists of any length are fed as there is room.

        `images`, with ``enable_multimodal``: for each prompt a list of its images, one for each of the model's tags in
        it; of a single prompt its list. An image is one of PIL's, its file as bytes, a path or a URL.

        `prompts` (text) or `prompt_token_ids`, one of the two. `sampling` has the names of the native API's
        ``parameters`` (max_new_tokens, do_sample, temperature, top_p, top_k, min_p, typical_p, seed, n or best_of,
        presence_penalty, stop_sequences, ignore_eos, logit_bias, allowed_token_ids, bad_words, prompt_logprobs,
        guided_json, guided_regex, guided_choice, guided_grammar, …)
        and top_logprobs (0 … 20); it is for all prompts.
        `parameters`, one dict per prompt, overrides it. As in the native API a stop text is part of the output that
        it ends.

        `detokenize` False makes no text: `text` is None, and stop texts can't be looked for.
        `progress`: a bar with requests done and tokens/s, where standard error is a terminal.
        `max_running`: in this call at most so many sequences run at a time; unset: running_max_req_size.

        Raises InvalidRequest, which names field, value and bound, before anything has begun, and EngineError when the
        engine can't go on; it can't be used then either. ^C ends what is running after the step that is out.
        """
        self._check_usable()
        jobs = open_jobs(
            self.intake, lambda: self.tokenizer, prompts, prompt_token_ids, parameters, sampling, detokenize, images
        )
        self._run_all(jobs, progress, max_running)
        return [job.output() for job in jobs]

    def chat(
        self,
        conversations: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        *,
        parameters: Sequence[Mapping[str, Any]] | None = None,
        template: Mapping[str, Any] | None = None,
        progress: bool = True,
        max_running: int | None = None,
        **sampling: Any,
    ) -> list[Output]:
        """Answers every conversation (or a single one): messages with ``role`` and ``content``, a text or a list of
        parts: ``{"type": "text", "text": …}``, ``{"type": "image", "image": …}`` as `generate` has images, or OpenAI's
        ``image_url``. `template`: further names for the model's chat template. The others are as `generate` has them.
        """
        self._check_usable()
        jobs = chat_jobs(self.intake, lambda: self.tokenizer, conversations, parameters, sampling, dict(template or {}))
        self._run_all(jobs, progress, max_running)
        return [job.output() for job in jobs]

    def score(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        prompt_token_ids: Sequence[Sequence[int]] | None = None,
        add_special_tokens: bool = True,
        use_cache: bool = True,
        progress: bool = True,
        max_running: int | None = None,
    ) -> list[Scored]:
        """What a model that scores (``use_reward_model=True``) makes of every prompt, in the prompts' order.

        `prompts` (text, with what a chat template puts into it) or `prompt_token_ids`, one of the two.
        `add_special_tokens`: around texts. `use_cache`: of prompts, where use_dynamic_prompt_cache is on. `progress`,
        `max_running` and what is raised are as `generate` has them.
        """
        self._check_usable()
        jobs = pooling_jobs(
            self.intake, prompts, prompt_token_ids, add_special_tokens=add_special_tokens, use_cache=use_cache
        )
        self._run_all(jobs, progress, max_running)
        return [job.output() for job in jobs]

    def embed(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        prompt_token_ids: Sequence[Sequence[int]] | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        add_special_tokens: bool = True,
        use_cache: bool = True,
        progress: bool = True,
        max_running: int | None = None,
    ) -> list[Embedded]:
        """A vector of the last hidden states of every prompt, in the prompts' order, by any model that doesn't score.

        How the states are pooled says the model, or ``[engine] pooling`` (``pooling="mean"``). `dimensions`: only so
        many values, with the length 1. `normalize`: whether vectors get the length 1; None: as the model says. The
        others are as `score` has them.
        """
        self._check_usable()
        if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
            raise InvalidRequest(f"dimensions: should be a positive integer; got {dimensions!r}", param="dimensions")
        jobs = pooling_jobs(
            self.intake,
            prompts,
            prompt_token_ids,
            add_special_tokens=add_special_tokens,
            use_cache=use_cache,
            embeds=True,
            dimensions=dimensions,
            unit=normalize,
        )
        self._run_all(jobs, progress, max_running)
        return [job.embedded() for job in jobs]

    def run_jobs(self, jobs: Iterable[Job], ended: Callable[[Job], None], expected: int | None = None) -> None:
        """Runs `jobs` until all have ended, each of which `ended` is told. One is asked for when there is room for it,
        so that there may be any number. `expected`: of a progress bar, which tells jobs; None: there is none.

        Raises EngineError when the engine can't go on, and what `jobs` and `ended` raise. ^C ends what is running.
        """
        self._check_usable()
        with RequestBar(expected or 0, bool(expected)) as bar, _deferred_interrupt() as check:
            try:
                self._run(jobs, bar, check, ended)
            except BaseException:
                self._abandon()
                raise

    def _run_all(self, jobs: Sequence[Job], progress: bool, max_running: int | None) -> None:
        with self._limited(max_running), RequestBar(len(jobs), progress) as bar, _deferred_interrupt() as check:
            try:
                self._run(jobs, bar, check, lambda job: None)
            except BaseException:
                self._abandon()
                raise

    def _run(
        self, jobs: Iterable[Job], bar: RequestBar, check: Callable[[], None], ended: Callable[[Job], None]
    ) -> None:
        """Until all have ended. `check` raises KeyboardInterrupt when one is due."""
        coming = iter(jobs)
        job = next(coming, None)
        while job is not None or self._loop.busy:
            while job is not None and self._submit(job):
                job = next(coming, None)
            for output in self._turn():
                done = self._deliver(output)
                for one in done:
                    ended(one)
                bar.advance(len(done), len(output.tokens))
            check()

    def _submit(self, job: Job) -> bool:
        """False: the queue is full."""
        number = self._numbers + 1
        branches = job.width
        # The number stands for the time of arrival: it orders requests as a clock would.
        message = Submit(number, *OWNER, number, job.prompt_ids, job.params, list(range(branches)), [[]] * branches)
        message.images = [*job.images]
        seen = job.seen
        images = self._sight.of(message, seen) if self._sight and isinstance(seen, OfflineSeen) else None
        rejected = self._scheduler.submit(message, images=images)
        if rejected is None:
            self._numbers = number
            self._jobs[number] = job
        elif rejected.reason != "queue_full":
            raise InvalidRequest(rejected.message)
        return rejected is None

    def _deliver(self, output: StepOutput) -> list[Job]:
        """Gives each branch its token, each prompt that is scored its vectors. Returns those that ended."""
        jobs: dict[int, Job] = self._jobs
        ended: list[Job] = []
        for number, cached in output.cached:
            if number in jobs:
                jobs[number].cached = cached
        for result in output.pooled:
            if result.vectors is None:
                raise EngineError("the model's vectors are not numbers (NaN): this data_type is too narrow for it")
            scored = jobs.pop(result.request)
            assert isinstance(scored, ScoreJob)
            scored.vectors = result.vectors
            ended.append(scored)
        for part in output.prompts:
            told = jobs.get(part.request)
            if isinstance(told, OfflineJob) and not told.prompt_log.take(part):
                raise EngineError(f"request {part.request}: a part of its prompt's log-probabilities is missing")
        rows = zip(
            output.requests,
            output.branches,
            output.tokens,
            output.logprobs,
            output.finishes,
            output.alternatives or [None] * len(output.tokens),
            strict=True,
        )
        for number, branch, token, logprob, finish, alternatives in rows:
            job = jobs.get(number)
            if not isinstance(job, OfflineJob):
                continue  # all its branches found their stop while this step was out
            if job.take(branch, token, logprob, alternatives, finish):
                self._scheduler.abort(number, [branch])
            if not job.left:
                del jobs[number]
                ended.append(job)
        return ended

    def _turn(self) -> list[StepOutput]:
        """One turn of the engine. What breaks it leaves scheduler and runner of two minds, so nothing may follow."""
        try:
            with self._blaming():
                outputs = list(self._loop.turn(self._beat).values())
        except BaseException as failure:
            self._unusable = f"it broke off with {type(failure).__name__}: {failure}"
            raise
        for _, refused in self._scheduler.take_refused():
            raise InvalidRequest(refused.message)
        return outputs

    def _abandon(self) -> None:
        """Ends all that runs, so that the engine is as before the call."""
        for number in self._jobs:
            self._scheduler.abort(number)
        self._jobs.clear()
        while not self._unusable and self._loop.busy:
            self._turn()

    @contextmanager
    def _limited(self, max_running: int | None) -> Iterator[None]:
        """Admission with fewer rows than there are. Raises InvalidRequest."""
        limits = self._scheduler.limits
        rows = limits.running_max_req_size
        if max_running is not None and not 1 <= max_running <= rows:
            raise InvalidRequest(f"max_running: should be 1 … {rows} (running_max_req_size); got {max_running}")
        self._scheduler.limits = limits._replace(running_max_req_size=max_running or rows)
        try:
            yield
        finally:
            self._scheduler.limits = limits

    # --- life ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Frees weights and KV cache. Nothing can be generated afterwards; a second call does nothing."""
        self._unusable = self._unusable or "it is closed"
        if "tokenizer" in self.__dict__:
            self.tokenizer.close()
        self._end_ranks()
        for name in ("_loop", "_scheduler", "_runner", "_sight"):
            self.__dict__.pop(name, None)
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    # --- other ranks ----------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Between layers, and while the device is waited for."""
        if self._ranks:
            self._ranks.check()

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """What ended another rank is raised instead of what that did to this one."""
        try:
            yield
        except RankGone as gone:
            assert self._ranks is not None
            raise self._ranks.failure(gone) from gone

    def _end_ranks(self) -> None:
        """If there are any."""
        runner, ranks = self.__dict__.get("_runner"), self.__dict__.pop("_ranks", None)
        if isinstance(runner, LeadingRunner):
            runner.close()
        if ranks is not None:
            ranks.close()
            if "torch" in sys.modules:
                from lightllmd.engine.ranks.process_group import close_process_group

                close_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_usable(self) -> None:
        if self._unusable:
            raise EngineError(f"this LLM can't be used any more: {self._unusable}")


def _nothing() -> None:
    pass


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], None]]:
    """Holds ^C back until the given function is called, so that it never strikes within a step.

    Only in the main thread and only where Python's own handler is in force; elsewhere signals stay as they are.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield _nothing
        return
    due: list[int] = []

    def check() -> None:
        if due:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, lambda number, _: due.append(number))
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# --- parameters -> plan -----------------------------------------------------------------------------------------------


def _plan(model_dir: str | os.PathLike[str] | None, parameters: Mapping[str, Any]) -> Plan:
    """Checked, probed and resolved as the daemon does it, in this process."""
    flags, problems = _flags(parameters)
    if model_dir is not None:
        flags["model_dir"] = os.fspath(model_dir)
    try:
        config = load(None, flags)
        if problems:
            raise ConfigInvalid([])
        return _resolved(config)
    except ConfigInvalid as invalid:
        raise ConfigInvalid([*problems, *(replace(one, file=PLACE) for one in invalid.problems)]) from None


def _resolved(config: Config) -> Plan:
    """Probed and resolved. Raises ConfigInvalid, WeightsInvalid, NoUsableDevice."""
    params, engine = config.params, config.engine
    asked = Request(
        model_dir=params.model_dir,
        load_way=params.load_way,
        backend=engine.backend,
        device=engine.device,
        threads=engine.threads,
        tokenizer_mode=params.tokenizer_mode,
        trust_remote_code=params.trust_remote_code,
    )
    facts = probe(asked)
    return resolve(config, facts)


def _flags(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Dotted keys as `config.load` takes them, and what is no parameter."""
    flags: dict[str, Any] = {}
    problems = []
    for name, value in _flattened(parameters, ""):
        key = name if name in by_key(Config) else f"engine.{name}"
        if key not in by_key(Config) or not ("." not in key or key.startswith(("engine.", "quantise."))):
            close = nearest_key(name)
            problems.append(
                Problem(name, f"unknown parameter; nearest: {close}" if close else "unknown parameter", PLACE)
            )
        elif key in flags:
            problems.append(Problem(name, "is given twice", PLACE))
        else:
            flags[key] = value
    return flags, problems


def _flattened(parameters: Mapping[str, Any], table: str) -> Iterator[tuple[str, Any]]:
    for name, value in parameters.items():
        key = f"{table}{name}"
        if isinstance(value, Mapping) and key in ("engine", "engine.fake", "quantise"):
            yield from _flattened(value, f"{key}.")
        else:
            yield key, value
