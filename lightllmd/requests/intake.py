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
from lightllmd.ipc.messages import ImageSpan, RequestParams, SamplingParams
from lightllmd.requests.asked import Asked, Chat, Prompt
from lightllmd.requests.branch import Branch, TextOptions, open_branches
from lightllmd.requests.constraint import Constraint
from lightllmd.requests.faults import naming
from lightllmd.requests.images import AskedImage
from lightllmd.requests.limits import Ids, RequestLimits
from lightllmd.requests.scoring import ScoresAsked, ScoringIntake, ScoringJob
from lightllmd.requests.seeing import EncodedPrompt, Holding, ImageIntake, SeenImages, Sight
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

    @property
    def images(self) -> Sequence[ImageSpan]:
        """As `Submit.images`."""

    @property
    def seen(self) -> SeenImages | None:
        """Which have to be released when it has ended."""

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
    images: Sequence[ImageSpan] = ()
    seen: SeenImages | None = None

    def branches(self, tokenizer: Tokenizer | None) -> list[Branch]:
        """Without a tokenizer they have no text."""
        return open_branches(self.params.n, self.prompt_ids, self.text, tokenizer, self.params.healing)


class _Fitted(NamedTuple):
    """A prompt within the limits."""

    given: EncodedPrompt
    cut: bool
    new_tokens: int

    @property
    def ids(self) -> Ids:
        """Its tokens."""
        return self.given.ids


class Intake:
    """Of one plan; serves the HTTP dialects and the offline class. `tokenizer` is called when it is needed; `sight`:
    None where no images are served."""

    def __init__(
        self, plan: Plan, tokenizer: Callable[[], Tokenizer], work: TextWork, sight: Sight | None = None
    ) -> None:
        params = plan.config.params
        self.limits = RequestLimits.of(plan)
        self.beams = self.limits.beam_mode  # n > 1 is a beam search
        self.tells_totals = params.beam_mode or params.diverse_mode  # the tokens of n > 1 have cumulative logprobs
        self.scores_prompts = params.return_all_prompt_logprobs  # answers tell the prompt's log-probabilities
        self._heals = params.token_healing_mode
        self._tokenizer = tokenizer
        self._work = work
        self._http = plan.config.http
        self._images = ImageIntake(plan, tokenizer, work, sight)
        self._scores = ScoringIntake(plan, self.limits, work, self._images)

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
        with naming(asked.names.subject), Holding() as holding:
            return await self._checked(asked, holding)

    async def ids(self, prompt: Prompt, *, add_special_tokens: bool = False) -> Ids:
        """The tokens of a prompt of any length with images, at least one. Raises InvalidRequest, and what `Sight.show`
        raises."""
        content, images = prompt.content, _images(prompt)
        assert isinstance(content, str | Chat)
        holding = Holding()
        try:
            given = await self._images.given(
                content, images, prompt.field, holding, cut=True, add_special_tokens=add_special_tokens
            )
            return given.ids
        finally:
            holding.release()

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

    async def _checked(self, asked: Asked, holding: Holding) -> list[AdmittedJob]:
        if asked.dialogue is None:
            return await self._admitted(asked, holding)
        (prompt,) = asked.prompts
        assert isinstance(prompt.content, Chat)
        prepared = self.conventions.prepare(prompt.content.messages, prompt.content.options, asked.dialogue)
        chat = Chat(prepared.messages, prepared.options, prompt.content.images)
        asked = replace(asked, prompts=[replace(prompt, content=chat)], text=replace(asked.text, marks=prepared.marks))
        return await self._admitted(asked, holding, prepared)

    def _prompt_end(self, prepared: PreparedChat, ids: Sequence[int]) -> str:
        if prepared.think is None:
            return ""
        return self._tokenizer().decode(ids[-_PROMPT_END:], skip_special_tokens=False)

    async def _admitted(
        self, asked: Asked, holding: Holding, prepared: PreparedChat | None = None
    ) -> list[AdmittedJob]:
        """`prepared`: the only prompt, which says more of the output once it is rendered."""
        names, sequences = asked.names, asked.params.n
        if names.prompts is not None:
            self.limits.at_once(len(asked.prompts) * sequences, names.prompts)
        self.limits.branches(sequences, names.sequences)
        self._expected_beams(asked)
        if asked.prompts_first or prepared is not None:
            prompts = await self._prompts(asked, holding)
            if prepared is not None:
                end = self._prompt_end(prepared, prompts[0].ids)
                asked = replace(asked, constraint=prepared.constraint(end, asked.constraint))
            text = await self._text(asked)
            params = await self._params(asked)
        else:
            params = await self._params(asked)
            text = await self._text(asked)
            prompts = await self._prompts(asked, holding)
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

    async def _prompts(self, asked: Asked, holding: Holding) -> list[_Fitted]:
        cut = asked.keep_last is not None
        asked = replace(asked, prompts=[self._read(prompt) for prompt in asked.prompts])
        for prompt in asked.prompts:
            self._images.check(_images(prompt))
            if prompt.images is not None and isinstance(prompt.content, str):
                self._images.check_tags(prompt.content, len(prompt.images), prompt.field)
        texts = [prompt for prompt in asked.prompts if isinstance(prompt.content, str) and not prompt.images]
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
        given: list[EncodedPrompt] = []
        for prompt in asked.prompts:
            if isinstance(prompt.content, Chat):
                given.append(await self._chat(asked, prompt.content, prompt.field, holding))
            elif prompt.images:
                special = asked.add_special_tokens
                given.append(await self._seeing(prompt, holding, add_special_tokens=special, cut=cut))
            else:
                given.append(EncodedPrompt(next(encoded) if isinstance(prompt.content, str) else prompt.content))
        return await self._work.compute(_size([one.ids for one in given]), self._fitted, asked, given)

    def _read(self, prompt: Prompt) -> Prompt:
        """Raises InvalidRequest."""
        if not prompt.markdown or not isinstance(prompt.content, str):
            return prompt
        text, images = self._images.read(prompt.content, prompt.field)
        return replace(prompt, content=text, images=images, markdown=False)

    async def _seeing(self, prompt: Prompt, holding: Holding, *, add_special_tokens: bool, cut: bool) -> EncodedPrompt:
        """A text with images."""
        prompt = self._read(prompt)
        assert isinstance(prompt.content, str)
        return await self._images.given(
            prompt.content, prompt.images or (), prompt.field, holding, add_special_tokens=add_special_tokens, cut=cut
        )

    async def _chat(self, asked: Asked, chat: Chat, field: str, holding: Holding) -> EncodedPrompt:
        """Its tokens; without its oldest messages, where those are to go for the others."""
        shown = await self._images.show(chat.images, holding) if chat.images and asked.drops_oldest else None

        async def encode(chat: Chat, cut: bool) -> EncodedPrompt:
            if not chat.images:
                return EncodedPrompt(await self._work.encode_chat(chat, field, cut=cut))
            return await self._images.given(chat, chat.images, field, holding, cut=cut, shown=shown)

        if not asked.drops_oldest:
            return await encode(chat, asked.keep_last is not None)
        limits = self.limits
        most = max(1, min(limits.max_req_input_len, limits.room(asked.new_tokens or 1, asked.params.n)))
        too_many = chat.size - most * _LONGEST
        while True:
            if too_many > 0:
                shorter = without_oldest(chat, too_many)
                if shorter is None:
                    return await encode(chat, False)
                chat = shorter
            given = await encode(chat, True)
            if len(given.ids) <= most:
                return given
            too_many = share(chat, len(given.ids), most)

    def _fitted(self, asked: Asked, given: Sequence[EncodedPrompt]) -> list[_Fitted]:
        return [self._fit(asked, prompt, one) for prompt, one in zip(asked.prompts, given, strict=True)]

    def _fit(self, asked: Asked, prompt: Prompt, given: EncodedPrompt) -> _Fitted:
        limits, sequences, length = self.limits, asked.params.n, len(given.ids)
        given = given.without(*_first(length, asked.keep_last, limits.max_req_input_len), prompt.field)
        given = given.without(*limits.cut(len(given.ids), prompt.field), prompt.field)
        ids = [*given.ids]
        limits.token_ids(ids, prompt.field)
        new_tokens = asked.new_tokens
        if new_tokens is None:
            room = limits.room(len(ids), sequences)
            most = asked.default_new_tokens
            new_tokens = max(1, room if most is None else min(room, most))
        limits.new_tokens(len(ids), new_tokens, sequences, asked.names.new_tokens or prompt.field)
        return _Fitted(given._replace(ids=ids), len(ids) != length, max(1, new_tokens))

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
        given, cut, new_tokens = fitted
        ids: list[int] = given.ids  # type: ignore[assignment]  # made by _fit
        run, healing, prompt_logprobs = ids, b"", params.prompt_logprobs
        if prompt.continued and self._heals and prompt_logprobs < 0:
            # As many tokens may pass before one shows, and they count. No image loses one.
            run, healing = roll_back(ids, self._tokenizer(), most=min(2, new_tokens - 1, given.behind_images))
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
        return AdmittedJob(ids, cut, run, own, text, images=given.images, seen=given.seen)


def _images(prompt: Prompt) -> Sequence[AskedImage]:
    """Those of a prompt of any kind."""
    return prompt.content.images if isinstance(prompt.content, Chat) else prompt.images or ()


def _size(prompts: Sequence[Ids]) -> int:
    """Of work on prompts' ids, as `TextWork.compute` takes it."""
    return sum(map(len, prompts)) // 4 + len(prompts) * JOB_COST


def _first(length: int, most: int | None, fitting: int) -> tuple[int, int]:
    """What goes of a prompt, from its first token on, see `Asked.keep_last`."""
    return 0, 0 if most is None else max(0, length - (fitting if most < 0 else most))


def _json(value: bool) -> str:
    return "true" if value else "false"
