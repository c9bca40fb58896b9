"""Verbs about the prompt cache: cache stats, cache flush."""

from __future__ import annotations

from typing import Any

import click

from lightllmctl.commands.group import VerbGroup
from lightllmctl.commands.options import json_option, waiting_options
from lightllmctl.context import CommandContext, pass_context
from lightllmd import console
from lightllmd.errors import CTL_USAGE


@click.group(cls=VerbGroup, invoke_without_command=True)
@click.pass_context
def cache(context: click.Context) -> int:
    """Look at the prompt cache of the engine in force, or empty it.

    Exit code 1 where there is none, use_dynamic_prompt_cache being off.
    """
    if context.invoked_subcommand is None:
        console.complain(context.get_help())
    return CTL_USAGE


@cache.command()
@json_option
@pass_context
def stats(context: CommandContext, as_json: bool) -> None:
    """Show how full it is and how many prompt tokens it saved.

    They are counted from the start of the engine's process on.
    """
    from lightllmctl.render import table

    answer = context.client.get("/v1/cache")
    if as_json:
        context.echo_json({"api": 1, **answer})
        return
    context.console.print(table(("TOKENS", "COUNT", "SHARE"), _rows(answer), right=(1,)))


def _rows(answer: dict[str, Any]) -> list[tuple[str, str, str]]:
    def row(name: str, key: str, of: str = "", whole: str = "") -> tuple[str, str, str]:
        count, total = answer.get(key, 0), answer.get(of)
        return name, f"{count:,}", f"{count / total:.0%} of {whole}" if total else "-"

    return [
        row("cached", "tokens", "kv_slots_total", "the KV cache"),
        row("unused now", "evictable", "tokens", "what is cached"),
        row("looked up", "lookup_tokens"),
        row("found", "hit_tokens", "lookup_tokens", "what was looked up"),
        row("evicted", "evicted_tokens"),
    ]


@cache.command()
@waiting_options
@pass_context
def flush(context: CommandContext, no_block: bool, timeout: float | None) -> None:
    """Forget what no running request uses."""
    from lightllmctl import jobs

    jobs.run(context, "cache/flush", {}, no_block, timeout)


COMMANDS = (cache,)
