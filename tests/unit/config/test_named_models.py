"""[models.NAME]: every fault is told with its line, and the configuration of a model says truly where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from lightllmd.config import models
from lightllmd.config.diff import diff
from lightllmd.config.load import load
from lightllmd.config.parameters import Config
from lightllmd.config.plan import DeviceFacts, Facts
from lightllmd.config.resolve import resolve
from lightllmd.config.setting import by_key
from lightllmd.errors import ConfigInvalid, NoSuchModel, Problem

TOP = 'model_dir = "/m/top"\nmax_total_token_num = 6000\n'  # two lines


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "a.toml"
    file.write_text(text)
    return str(file)


def problems(tmp_path: Path, text: str) -> list[Problem]:
    with pytest.raises(ConfigInvalid) as raised:
        load(write(tmp_path, text))
    return raised.value.problems


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = """\
model_dir = "/m/small/"
max_req_total_len = 4000
data_type = "bf16"

[http]
served_model_name = ""

[models.small]
model_dir = "/m/small"

[models."large-1.5"]
model_dir = "package:large"
max_req_total_len = 3000
eos_id = [7, 8]
"""
    return load(write(tmp_path, text), {"max_req_input_len": 1000})


@pytest.mark.parametrize(
    ("text", "line", "key", "part"),
    [
        ("[models.a]\n", 3, "models.a", "has no model_dir"),
        ("models = 3\n", 3, "models", "3 is an integer, expected tables [models.NAME]"),
        ('[[models]]\nmodel_dir = "b"\n', 3, "models", "is a list, expected tables [models.NAME]"),
        ("models.a = 3\n", 3, "models.a", "3 is an integer, expected a table [models.NAME]"),
        ('[models]\na = "b"\n', 4, "models.a", "expected a table"),
        ('[models."a b"]\nmodel_dir = "b"\n', 3, "models.a b", '"a b" is no name of a model: letters, digits'),
        ('[models.""]\nmodel_dir = "b"\n', 3, "models.", "is no name of a model"),
        ('[models."../a"]\nmodel_dir = "b"\n', 3, "models.../a", "is no name of a model"),
        (f'[models.{"a" * 129}]\nmodel_dir = "b"\n', 3, f"models.{'a' * 79}…", "at most 128"),
        ('[models.a]\nmodel_dir = ""\n', 4, "models.a.model_dir", "is empty"),
        ('[models.a]\nmodel_dir = 1\n', 4, "models.a.model_dir", "1 is an integer, expected a string"),
        ('[models.a]\nmodel_dir = "b"\nport = 1\n', 5, "models.a.port", "no parameter of a model (reload: front end)"),
        ('[models.a]\nmodel_dir = "b"\njob_name = "x"\n', 5, "models.a.job_name", "no parameter of a model"),
        ('[models.a]\nmodel_dir = "b"\ndatatype = "x"\n', 5, "models.a.datatype", "unknown key; nearest: data_type"),
        ('[models.a]\nmodel_dir = "b"\nzzzzz = 1\n', 5, "models.a.zzzzz", "unknown key; known: model_dir, "),
        ('[models.a]\nmodel_dir = "b"\n[models.a.engine]\n', 5, "models.a.engine", "is a table"),
        ('[models.a]\nmodel_dir = "b"\nengine.threads = 1\n', 5, "models.a.engine", "is a table"),
        ('[models.a]\nmodel_dir = "b"\ndata_type = "fp61"\n', 5, "models.a.data_type", 'nearest: "fp16"'),
        ('[models.a]\nmodel_dir = "b"\neos_id = [1,\n-2]\n', 6, "models.a.eos_id", "-2 is out of bounds"),
        ('[models.a]\nmodel_dir = "b"\ntp = 2.5\n', 5, "models.a.tp", "2.5 is a number, expected an integer"),
        ('[models.a]\nmodel_dir = "b"\nmode = ["x"]\n', 5, "models.a.mode", '"x" is no known mode'),
        (
            '[models.a]\nmodel_dir = "b"\nmax_req_total_len = 7000\n',
            5,
            "models.a.max_req_total_len",
            "max_req_total_len = 7000 must be at most max_total_token_num = 6000",
        ),
        (
            '[models.a]\nmodel_dir = "b"\nmode = ["ppl_fp16"]\ndata_type = "fp32"\n',
            6,
            "models.a.data_type",
            'not in data_type = "fp32"',
        ),
    ],
)  # fmt: skip
def test_a_fault_of_an_entry_is_told_with_key_and_line(
    tmp_path: Path, text: str, line: int, key: str, part: str
) -> None:
    (one,) = problems(tmp_path, TOP + text)
    assert (one.line, one.key) == (line, key)
    assert part in one.message
    assert str(one).startswith(f"{tmp_path / 'a.toml'}:{line}: {key}: ")


def test_all_faults_of_all_entries_are_told_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, TOP + "[models.a]\ntp = 0\n[models.b]\nmodel_dir = 1\nport = 2\n[models.c.d]\n")
    assert [(one.line, one.key) for one in found] == [
        (3, "models.a"), (4, "models.a.tp"), (6, "models.b.model_dir"), (7, "models.b.port"), (8, "models.c"),
        (8, "models.c.d"),
    ]  # fmt: skip


def test_a_contradiction_at_the_top_is_not_told_again_of_each_model(tmp_path: Path) -> None:
    text = 'model_dir = "m"\nmax_req_input_len = 3072\n[models.a]\nmodel_dir = "a"\n[models.b]\nmodel_dir = "b"\n'
    assert [one.key for one in problems(tmp_path, text)] == ["max_req_input_len"]


def test_a_rule_over_a_value_that_is_not_known_is_not_told(tmp_path: Path) -> None:
    text = TOP.replace("6000", '"six"') + '[models.a]\nmodel_dir = "b"\nmax_req_total_len = 70000\n'
    assert [one.key for one in problems(tmp_path, text)] == ["max_total_token_num"]
    text = TOP + '[models.a]\nmodel_dir = "b"\nmax_req_total_len = "x"\nmax_req_input_len = 5000\n'
    assert [one.key for one in problems(tmp_path, text)] == ["models.a.max_req_total_len"]


def test_an_entry_can_heal_nothing_at_the_top_but_replaces_a_faulty_value_for_itself(tmp_path: Path) -> None:
    text = TOP.replace("6000", '"six"') + '[models.a]\nmodel_dir = "b"\nmax_total_token_num = 3000\n'
    assert [one.key for one in problems(tmp_path, text)] == ["max_total_token_num", "models.a.max_total_token_num"]


@pytest.mark.parametrize("field", models.allowed(), ids=lambda field: field.key)
def test_an_entry_takes_every_parameter_of_the_engine_and_its_default(tmp_path: Path, field: Any) -> None:
    if field.default in (None, []) or field.key == "model_dir":
        return
    value = field.default if field.key != "max_total_token_num" else 100_000
    shown = msgspec.json.encode(value).decode()
    entry = load(write(tmp_path, f'model_dir = "m"\n[models.a]\nmodel_dir = "a"\n{field.key} = {shown}\n')).models
    assert entry == {"a": {"model_dir": "a", field.key: value}}


def test_a_table_that_belongs_to_a_model_can_be_overridden(tmp_path: Path) -> None:
    own = '[models.a]\nmodel_dir = "a"\n[models.a.quantise]\nrules = ["0: dense"]\n'
    file = write(tmp_path, 'model_dir = "m"\n[quantise]\nrules = ["all: w8a16"]\n' + own)
    config = load(file)
    served = models.with_model(config, "a")
    assert (config.params.quantise.rules, served.params.quantise.rules) == (["all: w8a16"], ["0: dense"])
    assert served.places["quantise.rules"] == 7
    assert models.others(config)["a"].quantise.rules == ["0: dense"]
    assert models.others(served)[models.TOP].quantise.rules == ["all: w8a16"]
    assert models.name_of(served) == "a"
    (change,) = diff(config, load(write(tmp_path, Path(file).read_text().replace("0: dense", "1: dense"))))
    assert (change.key, change.reload) == ("models.a.quantise.rules", "live")
    assert {one.key: one.reload for one in diff(config, served)}["quantise.rules"] == "engine"


@pytest.mark.parametrize(
    ("written", "key", "message"),
    [
        ('[models.a.quantise]\nrules = ["0: w8"]', "models.a.quantise.rules", "is no scheme"),
        ("[models.a.quantise]\nrule = 1", "models.a.quantise.rule", "nearest: quantise.rules"),
        ("[models.a]\nquantise = 1", "models.a.quantise", "expected a table"),
        ('[models.a.quantise]\nmixdown = "0"', "models.a.quantise.mixdown", "needs mode ppl_w8a8_mixdown"),
    ],
)
def test_a_fault_in_such_a_table_is_told_where_it_stands(tmp_path: Path, written: str, key: str, message: str) -> None:
    head, _, rest = written.partition("\n")
    table = '[models.a]\nmodel_dir = "a"\n' + (rest if head == "[models.a]" else written)
    (problem,) = problems(tmp_path, f'model_dir = "m"\n{table}\n')
    assert problem.key == key
    assert message in problem.message
    assert problem.line == len(f"model_dir\n{table}".splitlines())


def test_what_belongs_to_a_model_can_be_overridden() -> None:
    names = {field.key for field in models.allowed()}
    assert {"model_dir", "tokenizer_mode", "data_type", "mode", "tp", "eos_id", "max_req_total_len"} <= names
    assert names.isdisjoint({"host", "port", "log_stats_interval", "health_monitor", "use_tgi_api"})


def test_a_named_model_stands_over_the_top_and_over_flags(tmp_path: Path) -> None:
    file = write(tmp_path, TOP + '[models.a]\nmodel_dir = "/m/a"\nmax_req_total_len = 3000\n')
    config = load(file, {"max_req_total_len": 5000, "http.served_model_name": "flag"})
    served = models.with_model(config, "a")
    assert (served.params.model_dir, served.params.max_req_total_len) == ("/m/a", 3000)
    assert served.http.served_model_name == "a"
    assert served.params.max_total_token_num == 6000
    assert served.places == {
        **config.places,
        "model_dir": 4,
        "max_req_total_len": 5,
        "http.served_model_name": 4,
    }
    assert config.params.max_req_total_len == 5000, "what it was made from is as it was"


def test_a_problem_of_a_named_model_points_into_its_table(tmp_path: Path, config: Config) -> None:
    facts = Facts(None, DeviceFacts("cpu", "CPU", 1, 10**9, 10**9, ["float32"], 1))
    assert resolve(models.with_model(config, "large-1.5"), facts).model_name == "large-1.5"
    served = models.with_model(config, "large-1.5")
    assert [served.places[key] for key in ("model_dir", "max_req_total_len", "eos_id", "data_type")] == [12, 13, 14, 3]


def test_a_path_takes_its_own_name(config: Config) -> None:
    named = msgspec.structs.replace(config, http=msgspec.structs.replace(config.http, served_model_name="x"))
    served = models.with_path(named, "/m/other")
    assert (served.params.model_dir, served.http.served_model_name) == ("/m/other", "")
    assert served.places["model_dir"] == 0
    assert "http.served_model_name" not in served.places
    assert served.params.max_req_total_len == 4000


def test_a_name_is_taken_before_a_path(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "other").mkdir()
    assert models.choose(config, "small").params.model_dir == "/m/small"
    for path in ("other", "./small", "/nowhere/at/all", "package:large"):
        served = models.choose(config, path)
        assert (served.params.model_dir, served.http.served_model_name) == (path, "")


@pytest.mark.parametrize("text", ["smal", "", "nothing", "a\0b"])
def test_an_unknown_name_is_told_with_those_that_there_are(config: Config, text: str) -> None:
    with pytest.raises(NoSuchModel) as raised:
        models.choose(config, text)
    assert "[models] has small, large-1.5" in raised.value.message
    assert ("nearest: small" in raised.value.message) == (text == "smal")
    assert raised.value.parameters == {"model": text, "candidates": ["small", "large-1.5"]}
    with pytest.raises(NoSuchModel):
        models.with_model(config, text)
    with pytest.raises(NoSuchModel, match="the configuration has no"):
        models.choose(Config(), text)


def test_the_name_of_what_is_served(config: Config) -> None:
    assert models.name_of(config) == "small", "the same directory, written another way"
    assert models.name_of(models.with_model(config, "large-1.5")) == "large-1.5"
    assert models.name_of(models.with_path(config, "package:large")) is None, "the entry's own length is not in force"
    assert models.name_of(models.with_path(config, "/m/other")) is None
    assert models.name_of(Config()) is None


def test_of_two_entries_of_one_directory_the_one_in_force_is_served(tmp_path: Path) -> None:
    entries = '[models.a]\nmodel_dir = "/m/top"\ndata_type = "fp16"\n[models.b]\nmodel_dir = "/m/top"\n'
    config = load(write(tmp_path, TOP + entries))
    assert models.name_of(config) == "b", "nothing of a's is in force"
    assert models.name_of(models.with_model(config, "a")) == "a"
    assert models.name_of(load(write(tmp_path, TOP + 'data_type = "fp16"\n' + entries))) == "a"


OTHER = '[models.top]\nmodel_dir = "/m/top/"\n'  # with something else than the top says, another model


@pytest.mark.parametrize(
    "more",
    [
        'mode = ["triton_w8a16"]\n',
        "max_req_total_len = 4000\n",
        '[models.top.quantise]\nrules = ["all: w8a16"]\n',
    ],
)
def test_the_top_is_no_entry_that_says_anything_else(tmp_path: Path, more: str) -> None:
    config = load(write(tmp_path, TOP + OTHER + more))
    assert models.name_of(config) is None
    assert models.at_top(config) is config
    served, entry = config.params, models.with_model(config, "top").params
    assert served != entry
    assert models.others(config) == {"top": entry}
    assert models.others(models.with_model(config, "top")) == {models.TOP: served}
    facts = Facts(None, DeviceFacts("cpu", "CPU", 1, 10**9, 10**9, ["float32"], 1))
    plan = resolve(
        msgspec.structs.replace(config, engine=msgspec.structs.replace(config.engine, backend="fake")), facts
    )
    assert plan.model_name == "/m/top", "[models.top] has the name that the path would give"
    (told,) = [one for one in plan.derived if one.name == "model name"]
    assert "[models.top] is another model" in told.reason


def test_a_swap_back_to_the_top_is_asked_for_by_its_path_or_name(tmp_path: Path) -> None:
    named = '[http]\nserved_model_name = "base"\n' + OTHER + "max_req_total_len = 4000\n"
    config = load(write(tmp_path, TOP + named))
    assert models.choose(config, "top").params.max_req_total_len == 4000
    for text in ("/m/top", "/m/top/", "base"):
        assert models.choose(config, text) is config
    assert diff(config, models.choose(config, "base")) == []


@pytest.mark.parametrize(
    ("entry", "which"),
    [
        ('model_dir = "/m/other"\nmode = ["triton_w8a16"]\n', "another model_dir, mode"),
        ('model_dir = "/m/top"\ndata_type = "fp16"\n', "another data_type"),
        ('model_dir = "/m/top"\n', ""),
    ],
)
def test_the_top_has_no_name_of_another_model(tmp_path: Path, entry: str, which: str) -> None:
    text = TOP + f'[http]\nserved_model_name = "a"\n[models.a]\n{entry}'
    if not which:
        assert models.name_of(load(write(tmp_path, text))) == "a"
        return
    (one,) = problems(tmp_path, text)
    assert (one.line, one.key) == (4, "http.served_model_name")
    assert one.message == f'"a" is the name of [models.a], which has {which}'


def test_overrides_survive_the_way_to_a_child(config: Config) -> None:
    served = models.with_model(config, "large-1.5")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(served), type=Config) == served


def test_keys_of_entries_are_no_settings_of_their_own() -> None:
    assert not any(key.startswith(models.TABLE) for key in by_key(Config))
