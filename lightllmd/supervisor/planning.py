"""From configuration to plan."""

from __future__ import annotations

from dataclasses import dataclass

from lightllmd.config import resolve
from lightllmd.config.plan import Plan
from lightllmd.errors import LightllmdError
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.probing import Probe


@dataclass(frozen=True)
class Planned:
    """Event: the plan is made, or why it can't be."""

    plan: Plan | LightllmdError


class Planner:
    """Asks for the facts and resolves the configuration with them, once."""

    def __init__(self, context: Context, config_file: str | None) -> None:
        self._context = context
        self._config_file = config_file
        self._probe = Probe(context, config_file)

    async def run(self) -> None:
        """Posts `Planned`. Cancelled, it ends the probe."""
        params, engine = self._context.config.params, self._context.config.engine
        try:
            facts = await self._probe.ask(
                model_dir=params.model_dir,
                load_way=params.load_way,
                backend=engine.backend,
                device=engine.device,
                threads=engine.threads,
            )
            made: Plan | LightllmdError = resolve.resolve(self._context.config, facts, self._config_file)
        except LightllmdError as failure:
            made = failure
        self._context.post(Planned(made))

    def reap(self, pid: int) -> bool:
        """Reaps the probe if that is `pid`."""
        return self._probe.reap(pid)
