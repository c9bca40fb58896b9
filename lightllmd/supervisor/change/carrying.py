"""Whether what is in flight on one plan can go on on another."""

from __future__ import annotations

from typing import Any

from lightllmd.config.plan import Plan


def goes_on(old: Plan | None, new: Plan) -> bool:
    """Whether requests of the old plan can be replayed on the new one: the same model, and none is too long or has too
    many branches. How many slots there are doesn't matter: each holds the longest request, and the rest waits."""
    if old is None:
        return False
    before, now = old.config.params, new.config.params
    if before.beam_mode and old.max_total_token_num > new.max_total_token_num:
        return False  # the beams of a request need slots together
    return (
        _identity(old) == _identity(new)
        and before.max_req_total_len <= now.max_req_total_len
        and before.running_max_req_size <= now.running_max_req_size
    )


def _identity(plan: Plan) -> tuple[Any, ...]:
    """What makes tokens, or scores, mean the same."""
    model = plan.model
    where = (model.path, *(stamp.content for stamp in model.stamps)) if model else plan.config.params.model_dir
    return (
        where,
        plan.eos_id,
        plan.vocab_size,
        plan.tokenizer_mode,
        plan.config.params.beam_mode,
        plan.scoring,
        plan.schemes,
        plan.kv_scheme,
    )
