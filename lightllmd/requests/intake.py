"""From what is asked to jobs that an engine can run: every rule that needs the plan, once for all dialects."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import msgspec

from lightllmd.config.plan import Plan
from lightllmd.dialogue.conventions import Conventions, PreparedChat
from lightllmd.dialogue.parser import Parser
from lightllmd.errors import InvalidRequest
from lightllmd.ipc.messages import RequestParams, SamplingParams
from lightllmd.requests.asked import Asked, Chat, Prompt
from lightllmd.requests.branch import Branch, TextOptions, open_branches
from lightllmd.requests.constraint import Constraint
from lightllmd.requests.faults import naming
from lightllmd.requests.limits import Ids, RequestLimits
from lightllmd.requests.scoring import ScoresAsked, ScoringIntake, ScoringJob
from lightllmd.requests.shortening import share, without_oldest
from lightllmd.requests.text_work import JOB_COST, STOP_COST, TextWork
from lightllmd.text.healing import roll_back
from lightllmd.text.interface import Tokenizer
from lightllmd.text.stop import StopList

_LONGEST = 16  # characters of a token, about; more of a chat than that is not tokenised to see whether it fits
_PROMPT_END = 16  # tokens, in which the mark stands that reasoning begins with, if the prompt ends so


class Job(Protocol):
    """One prompt, checked and ready to run: an `AdmittedJob` or a `ScoringJob`."""

    @property
    def given_ids(self) -> list[int]:
        """The prompt."""

    @property
    def prompt_ids(self) -> list[int]:
        """What is run of it."""

    @property
    def params(self) -> RequestParams:
        """As the engine gets them."""

    def branches(self, tokenizer: Tokenizer | None) -> list[Branch]:
        """What its tokens go to."""


@dataclass(frozen=True)
class AdmittedJob:
    """One prompt that is continued, checked and ready to run."""

    given_ids: list[int]  # the prompt
    cut: bool  # because it was too long
    prompt_ids: list[int]  # what is run of it; `params.healing` has the text of the rest
    params: SamplingParams  # with the seed
    text: TextOptions
    parsers: Callable[[], Parser] | None = None  # makes one for each sequence; None: all output is content

    def branches(self, tokenizer: Tokenizer | None) -> list[Branch]:
        """Without a tokenizer they have no text."""
        return open_branches(self.params.n, self.prompt_ids, self.text, tokenizer, self.params.healing)


class _Fitted(NamedTuple):
    """A prompt within the limits."""

    ids: list[int]
    cut: bool
    new_tokens: int


class Intake:
    """Of one plan; serves the HTTP dialects and the offline class. `tokenizer` is called when it is needed."""

    def __init__(self, plan: Plan, tokenizer: Callable[[], Tokenizer], work: TextWork) -> None:
        params = plan.config.params
        self.limits = RequestLimits.of(plan)
        self.beams = self.limits.beam_mode  # n > 1 is a beam search
        self.tells_totals = params.beam_mode or params.diverse_mode  # the tokens of n > 1 have cumulative logprobs
        self.scores_prompts = params.return_all_prompt_logprobs  # answers tell the prompt's log-probabilities
        self._heals = params.token_healing_mode
        self._tokenizer = tokenizer
        self._work = work
        self._http = plan.config.http
        self._scores = ScoringIntake(plan, self.limits, work)

    async def of(self, asked: Asked | ScoresAsked) -> Sequence[Job]:
        """One job for each prompt. Raises InvalidRequest, which names the dialect's own field, its value and the
        bound."""
        return await (self.scores(asked) if isinstance(asked, ScoresAsked) else self.jobs(asked))

    async def scores(self, asked: ScoresAsked) -> list[ScoringJob]:
        """As `of`."""
        return await self._scores.jobs(asked)

    async def jobs(self, asked: Asked) -> list[AdmittedJob]:
        """As `of`."""
        self._scores.refuse_generation()
        with naming(asked.names.subject):
            return await self._checked(asked)

    @cached_property
    def conventions(self) -> Conventions:
        """How the model writes calls and reasoning."""
        tokenizer = self._tokenizer()
        special = {text: number for number in tokenizer.special_ids if (text := tokenizer.id_to_token(number))}
        return Conventions(
            tokenizer.chat_template,
            special=special,
            tool_parser=self._http.tool_parser,
            reasoning=self._http.reasoning == "apart",
        )

    async def _checked(self, asked: Asked) -> list[AdmittedJob]:
        if asked.dialogue is None:
            return await self._admitted(asked)
        (prompt,) = asked.prompts
        assert isinstance(prompt.content, Chat)
        prepared = self.conventions.prepare(prompt.content.messages, prompt.content.options, asked.dialogue)
        chat = Chat(prepared.messages, prepared.options)
        asked = replace(asked, prompts=[replace(prompt, content=chat)], text=replace(asked.text, marks=prepared.marks))
        return await self._admitted(asked, prepared)

    def _prompt_end(self, prepared: PreparedChat, ids: Sequence[int]) -> str:
        if prepared.think is None:
            return ""
        return self._tokenizer().decode(ids[-_PROMPT_END:], skip_special_tokens=False)

    async def _admitted(self, asked: Asked, prepared: PreparedChat | None = None) -> list[AdmittedJob]:
        """`prepared`: the only prompt, which says more of the output once it is rendered."""
        names, sequences = asked.names, asked.params.n
        if names.prompts is not None:
            self.limits.at_once(len(asked.prompts) * sequences, names.prompts)
        self.limits.branches(sequences, names.sequences)
        self._expected_beams(asked)
        if asked.prompts_first or prepared is not None:
            prompts = await self._prompts(asked)
            if prepared is not None:
                end = self._prompt_end(prepared, prompts[0].ids)
                asked = replace(asked, constraint=prepared.constraint(end, asked.constraint))
            text = await self._text(asked)
            params = await self._params(asked)
        else:
            params = await self._params(asked)
            text = await self._text(asked)
            prompts = await self._prompts(asked)
        size = _size([prompt.ids for prompt in prompts])
        jobs: list[AdmittedJob] = await self._work.compute(size, self._jobs, asked, prompts, params, text)
        if prepared is not None and prepared.parsed:
            jobs = [replace(job, parsers=prepared.parsers(self._prompt_end(prepared, job.given_ids))) for job in jobs]
        return jobs

    def _expected_beams(self, asked: Asked) -> None:
        beams, field = self.beams and asked.params.n > 1, f"{asked.names.prefix}use_beam_search"
        if asked.beams is not None and asked.beams != beams:
            raise InvalidRequest(
                f"{field}: with {asked.params.n} sequences and the server's beam_mode "
                f"{'on' if self.beams else 'off'} it should be {_json(beams)}; got {_json(asked.beams)}",
                param=field,
            )

    async def _params(self, asked: Asked) -> SamplingParams:
        """What the body says once for all its prompts."""
        params, prefix = asked.params, asked.names.prefix
        bad_words = await self._work.bad_words(asked.bad_texts, f"{prefix}bad_words")
        if bad_words:
            params = msgspec.structs.replace(params, bad_words=[*params.bad_words, *bad_words])
        if asked.constraint is not None:
            self._unhealed(asked, asked.constraint)
            params = msgspec.structs.replace(params, grammar=await self._work.grammar(asked.constraint))
        self.limits.constraints(params, prefix)
        self.limits.repeated(params, len(asked.prompts), prefix)
        if params.length_penalty != 1.0 and not self.beams:
            raise InvalidRequest(
                f"{prefix}length_penalty: beam search alone has one, and beam_mode is off; got {params.length_penalty}",
                param=f"{prefix}length_penalty",
            )
        return params

    def _unhealed(self, asked: Asked, constraint: Constraint) -> None:
        """Which tokens heal a prompt is not the grammar's, whose first token begins the output."""
        if self._heals and any(prompt.continued for prompt in asked.prompts):
            raise InvalidRequest(
                f"{constraint.field}: the server's token_healing_mode is on, which takes back the end of a prompt, and "
                f"a grammar begins behind it; got {constraint.kind}",
                param=constraint.field,
            )

    async def _text(self, asked: Asked) -> TextOptions:
        names = asked.names
        self.limits.token_ids(asked.stop_tokens, names.stop_tokens)
        for ids in asked.stop_sequences:
            self.limits.token_ids(ids, names.stops)
        with naming(names.stops):
            single = [[token] for token in dict.fromkeys(asked.stop_tokens)]
            stops = StopList(asked.stop_texts, [*asked.stop_sequences, *single])
        await self._work.compute(stops.size * STOP_COST, stops.build)
        return replace(asked.text, stops=stops)

    async def _prompts(self, asked: Asked) -> list[_Fitted]:
        cut = asked.keep_last is not None
        texts = [prompt for prompt in asked.prompts if isinstance(prompt.content, str)]
        encoded = iter(
            await self._work.encode(
                [str(prompt.content) for prompt in texts],
                [prompt.field for prompt in texts],
                add_special_tokens=asked.add_special_tokens,
                cut=cut,
            )
            if texts
            else ()
        )
        given: list[Ids] = []
        for prompt in asked.prompts:
            if isinstance(prompt.content, str):
                given.append(next(encoded))
            elif isinstance(prompt.content, Chat):
                given.append(await self._chat(asked, prompt.content, prompt.field))
            else:
                given.append(prompt.content)
        return await self._work.compute(_size(given), self._fitted, asked, given)

    async def _chat(self, asked: Asked, chat: Chat, field: str) -> Ids:
        """Its tokens; without its oldest messages, where those are to go for the others."""
        if not asked.drops_oldest:
            return await self._work.encode_chat(chat, field, cut=asked.keep_last is not None)
        limits = self.limits
        most = max(1, min(limits.max_req_input_len, limits.room(asked.new_tokens or 1, asked.params.n)))
        too_many = chat.size - most * _LONGEST
        while True:
            if too_many > 0:
                shorter = without_oldest(chat, too_many)
                if shorter is None:
                    return await self._work.encode_chat(chat, field, cut=False)
                chat = shorter
            ids = await self._work.encode_chat(chat, field, cut=True)
            if len(ids) <= most:
                return ids
            too_many = share(chat, len(ids), most)

    def _fitted(self, asked: Asked, given: Sequence[Ids]) -> list[_Fitted]:
        return [self._fit(asked, prompt, ids) for prompt, ids in zip(asked.prompts, given, strict=True)]

    def _fit(self, asked: Asked, prompt: Prompt, given: Ids) -> _Fitted:
        limits, sequences = self.limits, asked.params.n
        ids = [*limits.prompt(_last(given, asked.keep_last, limits.max_req_input_len), prompt.field)]
        new_tokens = asked.new_tokens
        if new_tokens is None:
            room = limits.room(len(ids), sequences)
            most = asked.default_new_tokens
            new_tokens = max(1, room if most is None else min(room, most))
        limits.new_tokens(len(ids), new_tokens, sequences, asked.names.new_tokens or prompt.field)
        return _Fitted(ids, len(ids) != len(given), max(1, new_tokens))

    def _jobs(
        self, asked: Asked, prompts: list[_Fitted], params: SamplingParams, text: TextOptions
    ) -> list[AdmittedJob]:
        jobs = [
            self._job(asked, prompt, fitted, params, text)
            for prompt, fitted in zip(asked.prompts, prompts, strict=True)
        ]
        if asked.names.prompts is not None:
            tokens = sum(len(job.given_ids) for job in jobs)
            self.limits.scored(tokens, jobs[0].params.prompt_logprobs, asked.names.prompts)
        return jobs

    def _job(
        self, asked: Asked, prompt: Prompt, fitted: _Fitted, params: SamplingParams, text: TextOptions
    ) -> AdmittedJob:
        """A prompt whose log-probabilities were asked for is scored whole, so it isn't healed."""
        ids, cut, new_tokens = fitted
        run, healing, prompt_logprobs = ids, b"", params.prompt_logprobs
        if prompt.continued and self._heals and prompt_logprobs < 0:
            # As many tokens may pass before one shows, and they count.
            run, healing = roll_back(ids, self._tokenizer(), most=min(2, new_tokens - 1))
        if asked.shows_prompt and self.scores_prompts:
            prompt_logprobs = max(0, prompt_logprobs)
        own = msgspec.structs.replace(
            params,
            max_new_tokens=new_tokens,
            min_new_tokens=min(params.min_new_tokens, new_tokens),
            seed=secrets.randbits(63) if asked.seed is None else asked.seed,
            healing=healing,
            prompt_logprobs=prompt_logprobs,
            stops=text.for_search() if self.beams and params.n > 1 and text.stops else None,
        )
        return AdmittedJob(ids, cut, run, own, text)


def _size(prompts: Sequence[Ids]) -> int:
    """Of work on prompts' ids, as `TextWork.compute` takes it."""
    return sum(map(len, prompts)) // 4 + len(prompts) * JOB_COST


def _last(ids: Ids, most: int | None, fitting: int) -> Ids:
    """What is kept of a prompt, see `Asked.keep_last`."""
    if most is None:
        return ids
    kept = fitting if most < 0 else most
    return ids if len(ids) <= kept else ids[-kept:] if kept else ids[:0]


def _json(value: bool) -> str:
    return "true" if value else "false"
