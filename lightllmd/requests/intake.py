"""From a prompt's ids and the checked fields of its body to a job that an engine can run: what only the plan knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from lightllmd.config.plan import Plan
from lightllmd.errors import InvalidRequest
from lightllmd.ipc.messages import SamplingParams
from lightllmd.requests.branch import TextOptions
from lightllmd.requests.limits import Limits
from lightllmd.text.healing import roll_back
from lightllmd.text.interface import Tokenizer


@dataclass(frozen=True)
class Job:
    """One prompt, checked and ready to run."""

    given_ids: list[int]  # the prompt
    cut: bool  # because it was too long
    prompt_ids: list[int]  # what is run of it; `params.healing` has the text of the rest
    params: SamplingParams
    seed: int | None
    text: TextOptions


class Intake:
    """Of one plan; serves HTTP and the offline class. `tokenizer` is called when it is needed."""

    def __init__(self, plan: Plan, tokenizer: Callable[[], Tokenizer]) -> None:
        params = plan.config.params
        self.limits = Limits.of(plan)
        self.beams = self.limits.beam_mode  # n > 1 is a beam search
        self.tells_totals = params.beam_mode or params.diverse_mode  # the tokens of n > 1 have cumulative logprobs
        self.scores_prompts = params.return_all_prompt_logprobs  # answers tell the prompt's log-probabilities
        self._heals = params.token_healing_mode
        self._tokenizer = tokenizer

    def params(
        self, params: SamplingParams, bad_words: list[list[int]], place: str = "", *, prompts: int = 1
    ) -> SamplingParams:
        """What a body says once for all its `prompts`, checked once. `bad_words` are those that were texts; `place` is
        the prefix of the fields' names. Raises InvalidRequest."""
        if bad_words:
            params = msgspec.structs.replace(params, bad_words=[*params.bad_words, *bad_words])
        self.limits.constraints(params, place)
        self.limits.repeated(params, prompts, place)
        if params.length_penalty != 1.0 and not self.beams:
            raise InvalidRequest(
                f"{place}length_penalty: beam search alone has one, and beam_mode is off; got {params.length_penalty}",
                param=f"{place}length_penalty",
            )
        return params

    def job(
        self,
        ids: list[int],
        params: SamplingParams,
        seed: int | None,
        text: TextOptions,
        *,
        cut: bool,
        heals: bool,
        shows_prompt: bool,
    ) -> Job:
        """`ids` have passed the limits, which have `cut` them or not. `heals`: the prompt is a text that the output
        continues. `shows_prompt`: the answer has room for log-probabilities of the prompt.

        A prompt of which they were asked for is scored whole, so it isn't healed.
        """
        run, healing = ids, b""
        if heals and self._heals and params.prompt_logprobs < 0:
            # As many tokens may pass before one shows, and they count.
            run, healing = roll_back(ids, self._tokenizer(), most=min(2, params.max_new_tokens - 1))
        if shows_prompt and self.scores_prompts:
            params = msgspec.structs.replace(params, prompt_logprobs=max(0, params.prompt_logprobs))
        if self.beams and params.n > 1 and text.stops:
            params = msgspec.structs.replace(params, stops=text.for_search())
        return Job(ids, cut, run, msgspec.structs.replace(params, healing=healing), seed, text)
