"""Requests move to another generation only where it can go on with them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lightllmd.config.parameters import Config, EngineSettings, Params
from lightllmd.config.plan import DeviceFacts, Facts, Plan
from lightllmd.config.resolve import resolve
from lightllmd.supervisor.change.carrying import goes_on

FACTS = Facts(None, DeviceFacts("cpu", "a CPU", 1, 1 << 34, 1 << 33, ["float32"], 2))


def plan(**params: Any) -> Plan:
    settings = {"model_dir": "m", "max_req_total_len": 2000, "max_req_input_len": 1000, "running_max_req_size": 50}
    return resolve(Config(params=Params(**(settings | params)), engine=EngineSettings(backend="fake")), FACTS)


@pytest.mark.parametrize(
    ("changed", "carried"),
    [
        ({}, True),
        ({"max_req_total_len": 3000}, True),
        ({"running_max_req_size": 60}, True),
        ({"max_total_token_num": 2001}, True),
        ({"max_req_total_len": 1999}, False),
        ({"running_max_req_size": 49}, False),
        ({"model_dir": "other"}, False),
        ({"eos_id": [3]}, False),
        ({"beam_mode": True}, False),
        ({"diverse_mode": True, "splitfuse_mode": True, "use_dynamic_prompt_cache": True}, True),
    ],
)
def test_the_same_model_goes_on_where_no_limit_shrinks(changed: dict[str, Any], carried: bool) -> None:
    assert goes_on(plan(), plan(**changed)) == carried


def test_beams_go_on_where_no_fewer_slots_are_there() -> None:
    old = plan(beam_mode=True, max_total_token_num=9000)
    assert goes_on(old, plan(beam_mode=True, max_total_token_num=9000))
    assert not goes_on(old, plan(beam_mode=True, max_total_token_num=8999))


def test_nothing_goes_on_from_nothing_or_in_another_vocabulary() -> None:
    assert not goes_on(None, plan())
    assert not goes_on(plan(), msgspec.structs.replace(plan(), vocab_size=300))
    assert not goes_on(plan(), msgspec.structs.replace(plan(), tokenizer_mode="slow"))
