"""Rank 0's runner: whatever it is told, the others are told first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from lightllmd.architecture.ranks import Rank
from lightllmd.config.plan import Plan
from lightllmd.engine.ranks import commands, notes
from lightllmd.engine.ranks.commands import Call, Command, LateMasks, LaunchStep
from lightllmd.engine.ranks.guard import PeerGuard, end_process
from lightllmd.engine.ranks.meeting import Meeting
from lightllmd.engine.ranks.member import Member
from lightllmd.engine.ranks.rendezvous import Rendezvous, listen
from lightllmd.engine.ranks.ring import RingWriter
from lightllmd.engine.runners.base import Beat, Progress
from lightllmd.engine.step import Masks, Runner, Step, StepResult
from lightllmd.errors import SystemFailure
from lightllmd.ipc.endpoints import meeting_path
from lightllmd.ipc.messages import EngineConfigure


class LeadingRunner:
    """The `Runner` of a group, around rank 0's own.

    Steps are computed by all at once: their collectives keep ranks together, and how far one may fall behind where
    there are none is what the ring holds. All else has ended on every rank when it returns. Each method raises
    RankGone once another rank has ended.
    """

    def __init__(self, own: Runner, ring: RingWriter, guard: PeerGuard) -> None:
        self._own, self._ring, self._guard = own, ring, guard
        self._begun = False  # to load

    @property
    def overlaps(self) -> bool:
        """See `Runner.overlaps`."""
        return self._own.overlaps

    # --- life ---------------------------------------------------------------------------------------------------------
    def load(self, plan: Plan, progress: Progress) -> None:
        """See `Runner.load`."""
        waited = partial(progress, 0, 0)
        self._tell(Call("load"), waited)
        # They have imported what they need by then, so that none waits long for the others where collectives begin.
        self._ring.wait_until_read(partial(self._wait, waited))
        self._begun = True
        with self._guard.blaming():
            self._own.load(plan, progress)
        self._wait_for_all(partial(self._tell_progress, progress))

    def prepare(self, beat: Beat) -> None:
        """See `Runner.prepare`."""
        self._tell(Call("prepare"), beat)
        with self._guard.blaming():
            self._own.prepare(beat)
        self._wait_for_all(beat)

    def stage(self) -> None:
        """See `Runner.stage`."""
        self._tell(Call("stage"), _nothing)
        self._own.stage()

    def unstage(self) -> None:
        """See `Runner.unstage`."""
        if self._begun:
            if not self._guard.gone:
                self._tell(Call("unstage"), _nothing)
            self._own.unstage()

    def release(self, progress: Progress) -> None:
        """See `Runner.release`."""
        self._tell(Call("release"), partial(progress, 0, 0))
        with self._guard.blaming():
            self._own.release(progress)
        self._wait_for_all(partial(self._tell_progress, progress))

    def restore(self, progress: Progress) -> None:
        """See `Runner.restore`."""
        self._tell(Call("restore"), partial(progress, 0, 0))
        with self._guard.blaming():
            self._own.restore(progress)
        self._wait_for_all(partial(self._tell_progress, progress))

    def memory_stats(self) -> dict[str, float]:
        """This rank's, but for what is staged: that of all, and -1 where any rank's host memory can't hold it."""
        stats = self._own.memory_stats()
        if "staged_bytes" in stats:
            done, total = self._ring.notes(notes.STAGED), self._ring.notes(notes.STAGED_OF)
            refused = stats["staged_bytes"] < 0 or min(done) < 0
            stats["staged_bytes"] = -1.0 if refused else stats["staged_bytes"] + sum(done)
            # A rank that has not said yet what there is to stage has as much as this one.
            own = stats["staged_total"]
            stats["staged_total"] = own + sum(one or own for one in total)
        return stats

    def close(self) -> None:
        """The other ranks end. Nothing may follow."""
        self._guard.farewell()
        self._guard.close()
        self._ring.close()

    # --- steps --------------------------------------------------------------------------------------------------------
    def launch(self, step: Step, beat: Beat, masks: Callable[[], Masks] | None = None) -> None:
        """See `Runner.launch`."""
        self._tell(LaunchStep(step, masks is not None), beat)
        with self._guard.blaming():
            self._own.launch(step, beat, masks and partial(self._passed_on, masks, beat))

    def _passed_on(self, masks: Callable[[], Masks], beat: Beat) -> Masks:
        found = masks()
        self._tell(LateMasks(found), beat)
        return found

    def collect(self, beat: Beat) -> StepResult:
        """See `Runner.collect`."""
        with self._guard.blaming():
            return self._own.collect(beat)

    # --- the others ---------------------------------------------------------------------------------------------------
    def _tell(self, command: Command, wait: Callable[[], None]) -> None:
        self._guard.check()
        self._ring.write(commands.encode(command), partial(self._wait, wait))

    def _wait(self, wait: Callable[[], None]) -> None:
        self._guard.check()
        wait()

    def _wait_for_all(self, wait: Callable[[], None]) -> None:
        self._ring.wait_until_handled(partial(self._wait, wait))

    def _tell_progress(self, progress: Progress) -> None:
        """Of the rank that has the largest part still to do."""
        ranks = zip(self._ring.notes(notes.DONE), self._ring.notes(notes.TOTAL), strict=True)
        progress(*min(ranks, key=lambda rank: rank[0] / max(1, rank[1])))


def lead(
    plan: Plan,
    configure: EngineConfigure,
    runner_of: Callable[[Member], Runner],
    on_gone: Callable[[int, bool], None],
    beat: Beat,
) -> LeadingRunner:
    """Waits for the other ranks, which are started beside this one; `beat` is called meanwhile. `runner_of` makes this
    rank's own runner, `on_gone` is `PeerGuard`'s. Raises SystemFailure."""
    ranks, listener, rendezvous = configure.ranks, None, None
    if plan.config.engine.backend != "fake":
        listener = listen(plan.rendezvous_port(configure.replica))
        rendezvous = Rendezvous(*listener.getsockname())
    try:
        ring = RingWriter(ranks - 1)
    except OSError as refused:
        raise SystemFailure(f"no shared memory for the messages of {ranks} ranks: {refused}") from refused
    meeting = Meeting(meeting_path(configure.endpoint), configure.generation, ranks)
    try:
        others = meeting.gather(lambda rank: (ring.fd, ring.wakes[rank - 1], ring.room), rendezvous, beat)
    finally:
        meeting.close()
    guard = PeerGuard(others, on_gone)
    guard.start(terminates=on_gone is end_process)
    return LeadingRunner(runner_of(Member(Rank(0, ranks), configure.device, rendezvous, listener)), ring, guard)


def _nothing() -> None:
    pass
