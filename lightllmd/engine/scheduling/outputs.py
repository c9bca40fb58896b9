"""What the api workers are told of a completed step."""

from __future__ import annotations

import numpy as np

from lightllmd.engine.scheduling.sequence import Owner, Sequence
from lightllmd.engine.step import Alternatives
from lightllmd.ipc.messages import Pooled, PoolingParams, StepOutput


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
    vectors, params = sequence.vectors, sequence.params
    assert isinstance(params, PoolingParams)
    if sequence.total is not None:
        vectors = [(sequence.total / len(sequence.prompt_ids)).astype("<f4").tobytes()]
    if params.size or params.unit:
        vectors = [_shaped(vector, params.size or None, params.unit) for vector in vectors]
    values = np.frombuffer(b"".join(vectors), "<f4")
    return Pooled(sequence.request, vectors if np.isfinite(values).all() else None)


def _shaped(vector: bytes, size: int | None, unit: bool) -> bytes:
    """Its beginning, of length 1 if `unit`; a vector of zeros stays what it is."""
    values = np.frombuffer(vector, "<f4")[:size].astype(np.float64)
    length = float(np.sqrt(values @ values)) if unit else 1.0
    return (values / (length or 1.0)).astype("<f4").tobytes()
