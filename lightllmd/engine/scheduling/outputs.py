"""What the api workers are told of a completed step."""

from __future__ import annotations

import numpy as np

from lightllmd.engine.scheduling.sequence import Owner, Sequence
from lightllmd.engine.step import Alternatives
from lightllmd.ipc.messages import Pooled, StepOutput


class Outputs(dict[Owner, StepOutput]):
    """One for each api worker that is told something."""

    def __init__(self, generation: int) -> None:
        super().__init__()
        self._generation = generation

    def __missing__(self, owner: Owner) -> StepOutput:
        output = self[owner] = StepOutput(self._generation, [], [], [], [], [], [])
        return output


def append_token(
    output: StepOutput,
    sequence: Sequence,
    position: int,
    token: int,
    logprob: float,
    alternatives: Alternatives | None,
    finish: int,
) -> None:
    """A sequence's next token. Alternatives are a column only where some token has any."""
    output.requests.append(sequence.request)
    output.branches.append(sequence.branch)
    output.positions.append(position)
    output.tokens.append(token)
    output.logprobs.append(logprob)
    output.finishes.append(finish)
    if alternatives is not None and output.alternatives is None:
        output.alternatives = [None] * (len(output.tokens) - 1)
    if output.alternatives is not None:
        output.alternatives.append(alternatives)


def pooled(sequence: Sequence) -> Pooled:
    """All that was asked for of a sequence that ended with its prompt."""
    values = np.frombuffer(b"".join(sequence.vectors), "<f4")
    return Pooled(sequence.request, sequence.vectors if np.isfinite(values).all() else None)
