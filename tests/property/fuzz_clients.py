"""Those for whom the scheduler works: what an api worker knows of its requests, and expects to be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightllmd.engine.runners.fake_model import fake_target, fake_target_alternatives
from lightllmd.ipc.messages import PromptLogprobs, SamplingParams, StepOutput, Submit
from property.fuzz_device import Branch
from property.fuzz_reference import Output, finishes, outputs

APIS = 2


@dataclass
class Ledger:
    """One request in flight as its api worker sees it."""

    request: int
    api: int
    arrival: int
    prompt: list[int]
    params: SamplingParams
    beams: bool
    open: dict[int, list[int]] = field(default_factory=dict)  # branch -> tokens so far
    replayed: bool = False
    suspect: int = 0
    batch: int = 0
    tenant: int = 0
    since: float = 0.0  # when this generation got it
    scored: int = 0  # prompt tokens whose log-probabilities are told
    # --- of this generation
    first: int = 0  # the branch that tells of the prompt
    skipped: int = 0  # prompt tokens that its first admission found in the cache
    cached: list[int] = field(default_factory=list)  # what was told of that
    _expected: list[Output] | None = None

    @property
    def expected(self) -> list[Output]:
        if self._expected is None:
            self._expected = outputs(self.prompt, self.params, self.beams)
        return self._expected


class Clients:
    """All api workers together."""

    def __init__(self) -> None:
        self.requests: dict[int, Ledger] = {}
        self.ended: list[list[int]] = []  # prompts and outputs, some of them
        self.arrivals = 0
        self.epochs = dict.fromkeys(range(APIS), 1)
        self.replacements = dict.fromkeys(range(APIS), 0)  # that died since the process of `epochs` began
        self.generation = 0

    def message(self, ledger: Ledger) -> Submit:
        branches = sorted(ledger.open)
        ledger.first, ledger.skipped, ledger.cached = branches[0], 0, []
        return Submit(
            *(ledger.request, ledger.api, self.epochs[ledger.api], ledger.arrival, ledger.prompt, ledger.params),
            branches=branches,
            emitted=[list(ledger.open[branch]) for branch in branches],
            batch=ledger.batch,
            tenant=ledger.tenant,
            replay=ledger.replayed,
            suspect=ledger.suspect,
        )

    def ledger(self, branch: Branch) -> Ledger | None:
        return self.requests.get(branch[0])

    def hear(self, owner: tuple[int, int], output: StepOutput) -> list[Branch]:
        """Returns whose tokens it tells, but for beams."""
        api, epoch = owner
        assert epoch == self.epochs[api]
        assert output.generation == self.generation
        for request, tokens in output.cached:
            assert not self.requests[request].cached, "it is told once"
            self.requests[request].cached.append(tokens)
        for part in output.prompts:
            self.hear_prompt(part)
        rows = len(output.tokens)
        columns = (output.requests, output.branches, output.positions, output.tokens, output.logprobs)
        others = output.alternatives or [None] * rows
        heard = []
        for request, branch, position, token, logprob, finish, shown in zip(
            *columns, output.finishes, others, strict=True
        ):
            ledger = self.requests[request]
            assert ledger.api == api
            tokens, expected = ledger.open[branch], ledger.expected[branch]
            assert position == len(tokens), "positions are contiguous per branch"
            assert (token, logprob) == (expected.tokens[position], expected.logprobs[position])
            assert shown == expected.alternatives[position]
            assert finish == finishes(expected)[position]
            if branch == ledger.first and not position:
                assert ledger.cached == [ledger.skipped] * (ledger.skipped > 0), "as the device saw it"
                assert ledger.params.prompt_logprobs < 0 or ledger.scored == len(ledger.prompt) - 1
            tokens.append(token)
            ledger.suspect = 0
            if not ledger.beams:
                heard.append((request, branch))
            if finish:
                self.ended[self.arrivals % 10 : self.arrivals % 10 + 1] = [ledger.prompt + tokens]
                self.close(ledger, branch)
        return heard

    def hear_prompt(self, part: PromptLogprobs) -> None:
        ledger = self.requests[part.request]
        prompt, last = ledger.prompt, part.first + len(part.logprobs) - 1
        assert not ledger.open.get(ledger.first), "all of it is told before the first token"
        assert 1 <= part.first <= ledger.scored + 1, "no part is missing"
        places = [(at - 1, prompt[at - 1]) for at in range(part.first, last + 1)]
        assert part.logprobs == [fake_target(*place, prompt[place[0] + 1]) for place in places]
        top = ledger.params.prompt_logprobs
        assert part.alternatives == ([fake_target_alternatives(*place, top) for place in places] if top else None)
        ledger.scored = max(ledger.scored, last)

    def close(self, ledger: Ledger, branch: int) -> None:
        del ledger.open[branch]
        if not ledger.open:
            del self.requests[ledger.request]
