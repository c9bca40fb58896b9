"""From configuration to plan: the facts are read by a child, the rest is arithmetic."""

from __future__ import annotations

from typing import Any

import msgspec

from lightllmd.config.models import others
from lightllmd.config.parameters import Config, Params
from lightllmd.config.plan import Facts, Other
from lightllmd.errors import ConfigInvalid, LightllmdError, NoUsableDevice
from lightllmd.supervisor.children.probing import FactsProbe
from lightllmd.supervisor.context import Context


async def facts_of(context: Context, config: Config, config_file: str | None) -> Facts:
    """Of the configured model and device, and of the models that room is to be kept for. Cancelled, it ends the probe.
    Raises LightllmdError."""
    kept = kept_beside(config)
    try:
        return await _ask(context, config, config_file, kept)
    except (ConfigInvalid, NoUsableDevice):
        raise  # not because of them
    except LightllmdError as failure:
        if not kept:
            raise
        # Whatever reading them did to the probe, the configured model is not to suffer for it.
        facts = await _ask(context, config, config_file, {})
        unread = {name: Other(params, fault=failure.message) for name, params in kept.items()}
        return msgspec.structs.replace(facts, others=unread)


async def _ask(context: Context, config: Config, config_file: str | None, kept: dict[str, Params]) -> Facts:
    return await FactsProbe(context, config, config_file).ask(**request(config, kept))


def kept_beside(config: Config) -> dict[str, Params]:
    """The models that room is to be kept for, by name."""
    return others(config) if config.supervisor.swap == "beside" else {}


def request(config: Config, kept: dict[str, Params]) -> dict[str, Any]:
    """As `lightllmd.probe` reads it."""
    return {
        "model_dir": config.params.model_dir,
        "load_way": config.params.load_way,
        "tokenizer_mode": config.params.tokenizer_mode,
        "trust_remote_code": config.params.trust_remote_code,
        "backend": config.engine.backend,
        "device": config.engine.device,
        "threads": config.engine.threads,
        "others": kept,
    }
