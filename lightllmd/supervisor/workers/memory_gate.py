"""Holds a start back until the bytes of its plan are free again, but not for ever."""

from __future__ import annotations

from dataclasses import dataclass

from lightllmd.config.amount import size
from lightllmd.config.plan import Plan
from lightllmd.errors import LightllmdError
from lightllmd.supervisor.background import BackgroundTask
from lightllmd.supervisor.children.probing import FactsProbe
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.host.procfs import available_memory

AGAIN = 0.5  # seconds between two looks at a GPU


@dataclass(frozen=True)
class Measured:
    """Event: what a GPU has free, in bytes; None where that can't be told."""

    gate: MemoryGate  # that asked
    due: int  # the number of the due start that it was asked for
    free: dict[int, int] | None  # by the index of the GPU


class MemoryGate:
    """Caller at every tick while a start is due. A dead engine's memory may take the kernel a while to take back.

    A CPU's free memory is read at once; a GPU's by a probe child, whose answer comes as `Measured`. What can't be told
    holds nothing back: the start itself will show.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._needed: dict[int, int] = {}  # by the index of the device, of which a CPU is number 0
        self._on_gpu = False
        self.asking: BackgroundTask[None] | None = None  # at most one probe is under way
        # Of the start that is due:
        self._due = 0  # its number
        self._since: float | None = None  # running clock: when it first asked; None: none is due
        self._next = 0.0  # running clock: when the GPU is asked again
        self._known = False  # there is an answer
        self._free: dict[int, int] | None = None  # and this is it
        self.short = False  # a start waits because too little is free

    def plan_for(self, plan: Plan, replica: int) -> None:
        """The bytes that the next start needs are this plan's, for the ranks of `replica`."""
        # What the next spare takes is left out, which is made behind the start. So the start waits for no byte that the
        # present one holds: its context becomes the engine's own, and is in the plan already.
        # Nor does it wait for the room of a model that isn't there.
        self._needed = {device: budget.taken for device, budget in plan.budgets_of(replica).items()}
        self._on_gpu = plan.device.kind == "cuda"

    def opens(self, name: str) -> bool:
        """Whether the start of `name`, which is due, may begin. True forgets it: the next one is asked for anew."""
        now, patience = self._context.clock.now, self._context.config.supervisor.memory_timeout
        if self._since is None:
            self._since, self._next = now, now
        if not self._on_gpu:
            available = available_memory()
            self._free, self._known = None if available is None else {0: available}, True
        elif self.asking is None and now >= self._next:
            self.asking = BackgroundTask(self._context, self._ask(self._due))
        short = self._short()
        enough = self._known and short is None
        if enough or now - self._since >= patience:
            self._due += 1
            self._since, self._free, self._known, self.short = None, None, False, False
            return True
        if self._known and not self.short and short is not None and self._free is not None:
            self.short = True
            where = f" of GPU {short}" if len(self._needed) > 1 else ""
            self._context.log.own(
                "warning",
                f"{name}: the plan needs {size(self._needed[short])}{where} and {size(self._free.get(short, 0))} are "
                f"free: waiting at most {patience:g} s",
            )
        return False

    def _short(self) -> int | None:
        """A device that has too little free for all that is known."""
        free = self._free
        if free is None:
            return None
        return next((device for device, needed in self._needed.items() if free.get(device, 0) < needed), None)

    def measured(self, answer: Measured) -> None:
        """Takes in what a probe found; an answer for an earlier start is passed over."""
        self.asking = None
        if answer.due == self._due:
            self._free, self._known = answer.free, True
            self._next = self._context.clock.now + AGAIN

    async def _ask(self, due: int) -> None:
        """Posts `Measured`. Cancelled, it ends the probe."""
        try:
            facts = await FactsProbe(self._context).ask(
                device_only=True, memory_only=True, device="cuda", threads=self._context.config.engine.threads
            )
        except LightllmdError as failure:
            self._context.log.own("warning", f"how much memory is free can't be told: {failure.message}")
            self._context.post(Measured(self, due, None))
        else:
            free = {device.index: device.memory_free for device in facts.device.usable}
            self._context.post(Measured(self, due, free))
