"""GPUs that the engines in force were planned for and that can't be used any more."""

from __future__ import annotations

from lightllmd.config.plan import Device, DeviceFacts
from lightllmd.errors import LightllmdError
from lightllmd.supervisor.background import BackgroundTask
from lightllmd.supervisor.children.probing import FactsProbe
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.workers.engines import Engines


class LostDevices:
    """Looked for by a probe child each time an engine died by itself. Belongs to the single-writer loop."""

    def __init__(self, context: Context, engines: Engines) -> None:
        self._context, self._engines = context, engines
        self._asking: BackgroundTask[DeviceFacts | None] | None = None
        self.named: list[str] = []  # by the last look
        self._planned_without: list[str] = []  # which a plan was asked for without already

    def look(self) -> None:
        """Called when an engine has died; one look at a time."""
        plan = self._engines.serving.plan
        if plan is not None and plan.device.kind == "cuda" and self._asking is None:
            self._asking = BackgroundTask(self._context, self._ask())

    async def _ask(self) -> DeviceFacts | None:
        config = self._context.config
        try:
            facts = await FactsProbe(self._context).ask(device_only=True, device="auto", threads=config.engine.threads)
        except LightllmdError as failure:
            self._context.log.own("warning", f"which GPUs are left can't be told: {failure.message}")
            return None
        return facts.device

    def step(self) -> None:
        """After every event: takes in what was found."""
        if self._asking is None or not self._asking.done:
            return
        found, self._asking = self._asking.result(), None
        if found is None:
            return
        before, self.named = self.named, self._missing(found)
        for name in self.named:
            if name not in before:
                self._context.events.add("device", f"lost: {name}", level="error")

    def _missing(self, now: DeviceFacts) -> list[str]:
        """Of those that the engines in force were planned for, by what stays the same when one is gone."""
        plan, facts = self._engines.serving.plan, self._engines.serving.facts
        if plan is None or facts is None or plan.device.kind != "cuda":
            return []
        usable = {_identity(device) for device in now.usable} if now.kind == "cuda" else set()
        faults = {_identity(device): device.fault for device in now.devices}
        planned = [device for device in facts.device.usable if device.index in plan.devices]
        gone = [device for device in planned if _identity(device) not in usable]
        return [f"{device.title}{_why(faults.get(_identity(device), ''))}" for device in gone]

    def to_replan(self) -> bool:
        """Whether a plan without them is to be made, since nothing serves; once for the same ones."""
        serving = self._engines.serving
        if not self.named or not self._context.config.engine.degrade or serving.ready:
            return False
        return self.named != self._planned_without

    def replanned(self) -> None:
        """A plan without them is on its way."""
        self._planned_without = list(self.named)


def _identity(device: Device) -> str:
    return device.uuid or device.bus_id or str(device.index)


def _why(fault: str) -> str:
    return f": {fault}" if fault else ""
