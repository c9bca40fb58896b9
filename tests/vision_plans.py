"""Plans of the fake engine that takes images."""

from __future__ import annotations

import msgspec

from engine_process import fake_plan
from lightllmd.config.plan import Plan, Vision


def seeing_plan(slots: int = 100, **params: object) -> Plan:
    plan = fake_plan(params, slots, 1)
    return msgspec.structs.replace(plan, vision=Vision("float32", most_tokens=8, token_bytes=16, patches=8, capacity=4))
