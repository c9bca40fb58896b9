"""Limits and requests for tests of the scheduler."""

from __future__ import annotations

from lightllmd.engine.admission import Limits
from lightllmd.ipc.messages import SamplingParams, Submit

DEFAULTS = {
    "max_total_token_num": 1000,
    "batch_max_tokens": 600,
    "running_max_req_size": 100,
    "router_token_ratio": 0.0,
    "router_max_new_token_len": 64,
    "router_max_wait_tokens": 10,
    "eos_ids": frozenset([256]),
    "max_queue": 100,
}


def limits(**changes: object) -> Limits:
    return Limits(**(DEFAULTS | changes))


def submit(request: int, length: int = 10, most: int = 20, **fields: object) -> Submit:
    """A request of api worker 0, epoch 1, whose prompt is its number over and over."""
    params = SamplingParams(max_new_tokens=most, **fields.pop("params", {}))
    values = {"branches": list(range(params.n)), "emitted": [[] for _ in range(params.n)]} | fields
    return Submit(request, 0, 1, request, [request % 256] * length, params, **values)
