"""One step of the engine as plain data: all that passes between the scheduler and a runner.

A runner sees nothing else, so a step can be broadcast to the ranks of a tensor-parallel group as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import msgspec

from lightllmd.config.plan import Plan
from lightllmd.ipc.messages import SamplingParams

Kind = Literal["prefill", "decode", "mixed"]


# Table row -> the tokens that it may sample from now on: bit t % 32 of little-endian word t // 32 allows token t,
# ceil(vocab / 32) words; empty: all.
Masks = dict[int, bytes]


class SamplingRow(msgspec.Struct):
    """What the runner needs to (re)build a row's sampling state, penalty counts included."""

    params: SamplingParams
    prompt_ids: list[int]
    emitted: list[int]  # generated before the row (re)entered: empty for a fresh one


class PoolingRow(msgspec.Struct):
    """Of a row that ends with its prompt: of which hidden states vectors are made, by the head of a model that scores,
    else by the last norm."""

    at: list[int]  # indices among the row's tokens, ascending; may be empty
    prompt_ids: list[int] | None = None  # set when the row (re)enters, None while it stays
    summed: bool = False  # they are one vector together, their sum, if there are any

    @property
    def vectors(self) -> int:
        """That a step makes of it."""
        return min(1, len(self.at)) if self.summed else len(self.at)


class ImagePart(msgspec.Struct):
    """Embeddings that take the place of those of some of a row's fed tokens: a part of an image span, or all of it.

    `values` holds ``[layers, rows, hidden]`` numbers, little-endian, of the plan's data type: what the decoder begins
    with at each token, then what is added to the outputs of its first layers, one after the other. It may be a view of
    memory that the visual worker shares, so it is read only."""

    first: int  # index among the row's fed tokens of the first one
    rows: int  # tokens
    values: memoryview
    layers: int = 1


class Row(msgspec.Struct):
    """One branch that is fed tokens which the scheduler names. Invariant: ``len(slots) == len(tokens)``, at least one
    unless it is a sibling.

    The fed tokens have the positions ``start .. start + len(tokens) - 1`` in the sequence, and their keys and values
    go to `slots`, which join the row's entries of the request->slot table at those indices. A prompt may come in
    several steps; the last part alone has `sample`.

    A *sibling* feeds nothing: its cached tokens are those of the row that it is a sibling of, and its next token is
    drawn from the same logits, by its own parameters.
    """

    table_row: int  # 0 .. running_max_req_size - 1; one owner from entry until it appears in Step.freed
    request: int
    branch: int
    start: int  # tokens whose keys and values are already in the cache, or come there with its sibling's
    tokens: list[int]  # ids fed in this step
    slots: list[int]
    sample: bool  # the last fed token yields a next token
    position: int  # index among the branch's generated tokens of the one to come (part of the random key)
    sampling: SamplingRow | None  # set when the row (re)enters, None while it stays
    prompt_length: int = 0  # 0: this row feeds all that there is, so the prompt is start + len(tokens) - position long
    past: list[int] | None = None  # slots of its first `start` tokens, where the table doesn't have them yet
    sibling_of: int | None = None  # index in Step.rows of an earlier row, which samples
    # For log-probabilities of the prompt: the token behind each fed one, as long as that is the prompt's.
    targets: list[int] | None = None
    top_targets: int = 0  # alternatives reported beside each target
    pooling: PoolingRow | None = None  # of each row of a request with PoolingParams, which never has `sample`
    images: list[ImagePart] | None = None  # ascending by `first`; None: all fed tokens are embedded by their ids
    # Runs of fed tokens, (index of the first one, tokens), ascending, each fed whole: its tokens see each other, later
    # ones as earlier ones, of which a layer's window may hide some.
    bidirectional: list[tuple[int, int]] | None = None
    # Of a model whose rotary positions are in the grids of images: int32 little-endian [3, len(tokens)], frame, row and
    # column of each fed token; None: all three are its index + `shift`, which they are of each token behind the prompt.
    positions: bytes | None = None
    shift: int = 0  # 0 or less; the same for as long as the row stays, decode rows included

    @property
    def enters(self) -> bool:
        """The runner knows nothing yet of what is under the row's number."""
        return self.sampling is not None or (self.pooling is not None and self.pooling.prompt_ids is not None)


class DecodeRows(msgspec.Struct):
    """Rows that go on with their own newest token, which the runner kept: parallel lists, one entry per row.

    The scheduler need not know that token yet, so a step can be launched before the one before it has ended.
    """

    table_rows: list[int]
    starts: list[int]  # tokens in the cache, which is the position of the fed one
    slots: list[int]  # where the fed token's keys and values go
    positions: list[int]  # as Row.position


class Step(msgspec.Struct):
    """`freed` rows are released before the others are read: the same number may be in both, with a new owner."""

    number: int  # counts from 1 within a generation
    # "decode": one token of each row; "prefill": no decode rows beside prompts; "mixed": both.
    kind: Kind
    decode: DecodeRows
    rows: list[Row]
    freed: list[int]  # table rows released since the last step
    masks: Masks = {}  # those that are known when the step is made. A row that enters is free until its mask comes

    @property
    def size(self) -> int:
        """Rows."""
        return len(self.decode.table_rows) + len(self.rows)

    @property
    def fed(self) -> int:
        """Tokens."""
        return len(self.decode.table_rows) + sum(len(row.tokens) for row in self.rows)


def no_decode() -> DecodeRows:
    """Of a step without decode rows."""
    return DecodeRows([], [], [], [])


Alternatives = list[tuple[int, float]]  # (token id, log-probability), best first
# What a beam may go on with, best first: (token id, its log-probability in the distribution that is searched, which has
# biases, penalties and masks, and the log-probability that is reported).
Candidate = tuple[int, float, float]


class TargetLogprobs(msgspec.Struct):
    """Of one row's `targets`: natural log of the model's own softmax, before penalties, masks and temperature."""

    logprobs: list[float]
    alternatives: list[Alternatives] | None  # None where `top_targets` is 0


class StepResult(msgspec.Struct):
    """One entry per decode row, then one per row with ``sample = True``, in their order.

    Log-probabilities are natural logs of the softmax of the model's logits; with ``[engine] logprobs = "processed"`` of
    those that biases, penalties, masks and the temperature have changed."""

    tokens: list[int]
    logprobs: list[float]  # at the chosen token; NaN: there is nothing to draw from
    alternatives: list[Alternatives | None]  # None where params.top_logprobs is 0
    candidates: list[list[Candidate] | None]  # None where params.candidates is 0
    targets: list[TargetLogprobs] = []  # one entry per row that has `targets`, in their order
    # One entry per row that has `pooling`, in their order: a vector for each place or their sum, fp32, little-endian.
    pooled: list[list[bytes]] = []


class Runner(Protocol):
    """What computes steps. Owns the KV cache, the request->slot table and each row's newest token.

    Steps are launched in order and collected in the same order, each once.
    """

    @property
    def overlaps(self) -> bool:
        """The next step may be launched before the one before it is collected."""

    def load(self, plan: Plan, progress: Callable[[int, int], None]) -> None:
        """Loads the model. Calls ``progress(done, total)`` (bytes) several times a second.

        Raises WeightsInvalid, OutOfMemory, NoUsableDevice, ConfigInvalid.
        """

    def prepare(self, beat: Callable[[], None]) -> None:
        """After `load`, before the first step: whatever makes later steps fast, and the worst admissible one, so that
        none of them can run out of memory. Raises OutOfMemory."""

    def launch(self, step: Step, beat: Callable[[], None], masks: Callable[[], Masks] | None = None) -> None:
        """Begins one step; a runner that does not overlap computes it here and calls `beat` between layers, which
        keeps heartbeats going. `masks`, called when the forward is launched, returns those of the step that could not
        be known before; it may collect the step before this one. Raises OutOfMemory."""

    def collect(self, beat: Callable[[], None]) -> StepResult:
        """Waits for the oldest step that is out. Raises OutOfMemory."""

    def stage(self) -> None:
        """Begins to copy the weights to host memory, beside the steps. Again, it does nothing unless they were refused
        before."""

    def unstage(self) -> None:
        """Gives up such a copy, or lets go of it."""

    def release(self, progress: Callable[[int, int], None]) -> None:
        """Gives back the device's memory; no step is out. What was staged is finished first (``progress(bytes,
        total)``) and stays; without it the weights are gone. Nothing but `restore` and `unstage` follows."""

    def restore(self, progress: Callable[[int, int], None]) -> None:
        """After `release`: as `load`, of the same plan, from the staged copy if there is one, which is let go of then.
        `prepare` follows."""

    def memory_stats(self) -> dict[str, float]:
        """What loading and the steps took so far: names of gauges, bytes. Since `stage` also "staged_bytes" of
        "staged_total", -1: host memory can't hold them; since `release` also "memory_asleep"."""
