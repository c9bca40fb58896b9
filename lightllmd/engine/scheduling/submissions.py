"""Which requests are taken: the bounds of one, the room in the queue, and api workers that are gone."""

from __future__ import annotations

from collections import deque

from lightllmd.engine.images.prompt_images import fault_of
from lightllmd.engine.scheduling.admission import SchedulerLimits
from lightllmd.engine.scheduling.queues import Queues
from lightllmd.engine.scheduling.sequence import Owner, Submission
from lightllmd.ipc.messages import PoolingParams, Rejected, Submit

_GONE_KEPT = 256  # what a dead process still sent arrives long before so many others die
MOST_SUBMISSIONS = 4096  # that are remembered: between two parts of a body come far fewer others
RETRY_AFTER = 1.0  # seconds; in the answer to a request that a full queue turns away


class Submissions:
    """Decides about each request once, when it arrives."""

    def __init__(self, limits: SchedulerLimits, generation: int, queues: Queues) -> None:
        self._limits, self._generation, self._waiting = limits, generation, queues.waiting
        self._submissions: dict[int, Submission] = {}  # the newest ones, by the number of their first request
        self._gone: deque[Owner] = deque(maxlen=_GONE_KEPT)  # processes of api workers that died last

    def __len__(self) -> int:
        """Submissions that are remembered."""
        return len(self._submissions)

    def is_gone(self, owner: Owner) -> bool:
        """The process of the api worker died, so no answer has a reader."""
        return owner in self._gone

    def forget(self, owner: Owner) -> None:
        """The process of an api worker died."""
        # One by one: while a replacement starts, or dies, the process before it lives and serves.
        self._gone.append(owner)

    def take(self, message: Submit) -> Submission | Rejected:
        """A request that is replayed is taken if it fits at all."""
        problem = self._never_fits(message)
        if problem:
            return Rejected(self._generation, message.request, "invalid", problem)
        submission = self._submission_of(message)
        if not submission.room and not message.replay:
            waiting, most = len(self._waiting), self._limits.max_queue
            text = f"the queue is full: {waiting} sequences wait, and http.max_queue is {most}"
            return Rejected(self._generation, message.request, "queue_full", text, RETRY_AFTER)
        return submission

    def _submission_of(self, message: Submit) -> Submission:
        """There is room while fewer than `max_queue` sequences wait, whatever a body brings: its parts are taken or
        turned away together, and one wider than the queue runs too. So that no tenant keeps the others out, one that
        has none in line finds room while fewer than twice as many wait."""
        number = message.batch or message.request
        submission = self._submissions.get(number)
        if submission is None or number == message.request:  # its first, perhaps once more
            most = self._limits.max_queue * (1 if self._waiting.has(message.tenant) else 2)
            submission = self._submissions[number] = Submission(len(self._waiting) < most)
            if len(self._submissions) > MOST_SUBMISSIONS:
                del self._submissions[next(iter(self._submissions))]
        return submission

    def _never_fits(self, message: Submit) -> str | None:
        prompt, params = len(message.prompt_ids), message.params
        if not prompt or not message.branches or len(message.branches) != len(message.emitted):
            return "a request needs a prompt and at least one unfinished branch"
        if not (isinstance(params, PoolingParams) or self._limits.generates):
            return "this engine generates no tokens"
        if isinstance(params, PoolingParams):
            places = [] if params.at is None else params.at
            if any(message.emitted) or message.branches != [0]:
                return "a request that generates nothing has one branch, without tokens"
            if places and (min(places) < 0 or max(places) >= prompt):
                return f"places {places[0]} to {places[-1]} are asked for of {prompt} tokens"
        elif any(len(emitted) >= params.max_new_tokens for emitted in message.emitted):
            return f"a branch has its {params.max_new_tokens} tokens already"
        if message.images:
            if fault := fault_of(message.images, prompt):
                return fault
            largest = max(span.tokens for span in message.images)
            if self._limits.whole_images and largest > self._limits.batch_max_tokens:
                return (
                    f"an image of {largest} tokens, which this model is fed in one step, exceeds batch_max_tokens "
                    f"{self._limits.batch_max_tokens}"
                )
        width = params.n if self._limits.beam_mode else 1
        if width > self._limits.running_max_req_size:
            return f"{width} beams exceed running_max_req_size {self._limits.running_max_req_size}"
        if prompt + width * params.max_new_tokens + 1 > self._limits.max_total_token_num:
            each = f"{width} beams x " if width > 1 else ""
            return (
                f"{prompt} prompt tokens + {each}{params.max_new_tokens} max_new_tokens + 1 "
                f"exceed max_total_token_num {self._limits.max_total_token_num}"
            )
        return None
