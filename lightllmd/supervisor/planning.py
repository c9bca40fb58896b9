"""From configuration to plan: the facts are read by a child, the rest is arithmetic."""

from __future__ import annotations

from lightllmd.config.parameters import Config
from lightllmd.config.plan import Facts
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.probing import Probe


async def facts_of(context: Context, config: Config, config_file: str | None) -> Facts:
    """Of the configured model and device. Cancelled, it ends the probe. Raises LightllmdError."""
    return await Probe(context, config, config_file).ask(
        model_dir=config.params.model_dir,
        load_way=config.params.load_way,
        backend=config.engine.backend,
        device=config.engine.device,
        threads=config.engine.threads,
    )
