"""A sequence: one branch of a request, as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from lightllmd.ipc.messages import SamplingParams, Submit

Owner = tuple[int, int]  # (api worker, its epoch)


class State(Enum):
    WAITING = "waiting"  # never admitted by this generation, new
    PAUSED = "paused"  # admitted before (by this generation or one that died); holds no slot and no row
    RUNNING = "running"  # owns a table row and slots
    ENDING = "ending"  # the step that makes its last token is out; holds nothing
    ENDED = "ended"  # finished or aborted; holds nothing


@dataclass(slots=True, eq=False)
class Sequence:
    """Set by the scheduler alone.

    Invariant while running: ``len(slots)`` tokens are in the cache as soon as the steps that are out have run. That is
    all of the prompt, the emitted and the pending ones but the newest.
    """

    request: int
    branch: int
    owner: Owner
    order: tuple[int, int, int]  # (arrival, request, branch): older is smaller
    prompt_ids: list[int]
    params: SamplingParams
    emitted: list[int]
    state: State
    suspect: bool = False  # had no token when an engine died: is admitted alone; cleared by its next token
    replayed: bool = False
    ticket: int = 0  # set on entry into a line: later entries have greater ones
    pending: int = 0  # tokens that steps which are out will make
    table_row: int = -1
    slots: list[int] = field(default_factory=list)

    @property
    def arrival_ns(self) -> int:
        return self.order[0]

    @property
    def length(self) -> int:
        """Tokens that a (re)admission feeds; nothing is pending then."""
        return len(self.prompt_ids) + len(self.emitted)

    def estimate(self, worst_case: bool, new_token_len: int) -> tuple[int, int]:
        """(tokens held after its next step, tokens still to come after that), as the admission rule counts them;
        pending ones count as emitted.

        The sum is the most slots that it will ever hold, when `worst_case` or ignore_eos; else an optimistic guess
        of the output's length takes the place of max_new_tokens.
        """
        emitted, most = len(self.emitted) + self.pending, self.params.max_new_tokens
        if not (worst_case or self.params.ignore_eos):
            most = min(most, max(int(1.1 * emitted), new_token_len))
        held = len(self.prompt_ids) + emitted + (self.state is not State.RUNNING)
        return held, max(0, most - emitted - 1 - (self.state is not State.RUNNING))


def sequences_of(submit: Submit) -> list[Sequence]:
    """The branches of a request that enters; a replayed one enters paused."""
    return [
        Sequence(
            request=submit.request,
            branch=branch,
            owner=(submit.api, submit.epoch),
            order=(submit.arrival_ns, submit.request, branch),
            prompt_ids=submit.prompt_ids,
            params=submit.params,
            emitted=list(emitted),
            state=State.PAUSED if submit.replay else State.WAITING,
            suspect=submit.suspect,
            replayed=submit.replay,
        )
        for branch, emitted in zip(submit.branches, submit.emitted, strict=True)
    ]
