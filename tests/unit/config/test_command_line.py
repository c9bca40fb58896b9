"""Flags are settings: they override the file, go through the same checks and are told apart from it in messages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightllmd import __version__
from lightllmd.config import cli
from lightllmd.config.parameters import Config
from lightllmd.config.setting import fields
from lightllmd.errors import EXIT_CONFIG, ConfigInvalid, Problem


def problems_of(*arguments: str) -> list[Problem]:
    with pytest.raises(ConfigInvalid) as raised:
        cli.parse(arguments)
    return raised.value.problems


def file_with(tmp_path: Path, text: str) -> str:
    (tmp_path / "a.toml").write_text(text)
    return str(tmp_path / "a.toml")


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--port", "9000"], "port", 9000),
        (["--port=9000"], "port", 9000),
        (["--eos_id", "2", "7"], "eos_id", [2, 7]),
        (["--eos_id", "2", "--eos_id", "7"], "eos_id", [2, 7]),
        (["--eos_id", "auto"], "eos_id", "auto"),
        (["--max_total_token_num", "auto"], "max_total_token_num", "auto"),
        (["--max_total_token_num", "5000"], "max_total_token_num", 5000),
        (["--disable_log_stats"], "disable_log_stats", True),
        (["--disable_log_stats=true"], "disable_log_stats", True),
        (["--disable_log_stats=false"], "disable_log_stats", False),
        (["--log_stats_interval", "0.5"], "log_stats_interval", 0.5),
        (["--log_stats_interval", "3"], "log_stats_interval", 3.0),
        (["--long_truncation_mode", "None"], "long_truncation_mode", None),
        (["--batch_max_tokens", "None"], "batch_max_tokens", None),
        (["--mode"], "mode", []),
        (["--http.workers", "2"], "http.workers", 2),
        (["--http.cors_origins", "*", "https://a.b"], "http.cors_origins", ["*", "https://a.b"]),
        (["--engine.backend", "fake"], "engine.backend", "fake"),
        (["--engine.fake.tokens_per_second", "50"], "engine.fake.tokens_per_second", 50.0),
        (["--supervisor.control_socket", "/tmp/c.sock"], "supervisor.control_socket", "/tmp/c.sock"),
    ],
)
def test_a_flag_sets_its_setting(arguments: list[str], key: str, value: Any) -> None:
    invocation = cli.parse(["--model_dir", "m", *arguments])
    field = next(field for field in fields(Config) if field.key == key)
    assert field.of(invocation.config) == value
    assert invocation.config.params.model_dir == "m"


def test_every_setting_is_a_flag() -> None:
    shown = cli._parser().format_help()
    for field in fields(Config):
        assert f"--{field.key} " in shown


def test_flags_override_the_file_and_the_environment_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_with(tmp_path, 'model_dir = "m"\nport = 8001\nmax_req_total_len = 4000\n')
    for name in ("PORT", "LIGHTLLMD_PORT", "port"):
        monkeypatch.setenv(name, "8003")
    invocation = cli.parse(["--config", file, "--port", "8002"])
    assert (invocation.config.params.port, invocation.config.params.max_req_total_len) == (8002, 4000)
    assert invocation.config_file == file
    assert invocation.config.places == {"model_dir": 1, "port": 0, "max_req_total_len": 3}


@pytest.mark.parametrize(
    ("arguments", "key", "part"),
    [
        (["--port", "70000"], "port", "70000 is out of bounds: 0 … 65535"),
        (["--port", "abc"], "port", '"abc" is a string, expected an integer'),
        (["--push_interval", "-5"], "push_interval", "-5 is out of bounds"),
        (["--eos_id", "2", "x"], "eos_id", '"x" is a string'),
        (["--disable_log_stats=yes"], "disable_log_stats", "expected true or false"),
        (["--data_type", "fp61"], "data_type", 'nearest: "fp16"'),
        (["--enable_multimodal=yes"], "enable_multimodal", 'expected "auto" or true or false'),
        (["--max_req_input_len", "5000"], "max_req_input_len", "less than max_req_total_len"),
        (["--router_token_ratio", "nan"], "router_token_ratio", "no finite number"),
    ],
)
def test_a_wrong_value_is_a_problem_of_the_command_line(arguments: list[str], key: str, part: str) -> None:
    (one,) = problems_of("--model_dir", "m", *arguments)
    assert (one.key, one.file, one.line) == (key, None, None)
    assert part in one.message
    assert str(one).startswith("command line: ")


def test_problems_of_file_and_flags_are_told_together(tmp_path: Path) -> None:
    file = file_with(tmp_path, 'model_dir = "m"\nprot = 1\n')
    assert [(one.file, one.line, one.key) for one in problems_of("--config", file, "--port", "x")] == [
        (file, 2, "prot"),
        (None, None, "port"),
    ]


def test_a_flag_lifts_what_the_file_asks_for_and_is_not_available(tmp_path: Path) -> None:
    file = file_with(tmp_path, 'model_dir = "m"\ncache_capacity = 2\n')
    parsed = cli.parse(["--config", file, "--cache_capacity", "200"])
    assert parsed.config.params.cache_capacity == 200


def test_without_the_default_file_a_model_on_the_command_line_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "DEFAULT_FILE", str(tmp_path / "none.toml"))
    assert cli.parse(["--model_dir", "m"]).config_file is None
    (one,) = problems_of()
    assert (one.file, one.message.split(";")[0]) == (str(tmp_path / "none.toml"), "does not exist")


def test_the_default_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "DEFAULT_FILE", file_with(tmp_path, 'model_dir = "of the file"\n'))
    assert cli.parse([]).config.params.model_dir == "of the file"


def test_check_takes_a_file_or_the_configured_one(tmp_path: Path) -> None:
    file = file_with(tmp_path, 'model_dir = "m"\n')
    for arguments in (["--check", file], ["--config", file, "--check"], ["--check", file, "--port", "1"]):
        invocation = cli.parse(arguments)
        assert (invocation.action, invocation.config_file) == ("check", file)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lightllmd", *arguments], capture_output=True, text=True, timeout=60)


def test_unknown_flag_names_the_nearest_and_exits_2() -> None:
    done = run("--max-total-token-num", "1")
    assert done.returncode == 2
    assert "nearest: --max_total_token_num" in done.stderr


def test_wrong_value_exits_78() -> None:
    done = run("--model_dir", "m", "--port", "70000")
    assert (done.returncode, done.stdout) == (EXIT_CONFIG, "")
    assert done.stderr == "command line: port: 70000 is out of bounds: 0 … 65535\n"


def test_version_help_and_the_generated_files() -> None:
    assert run("--version").stdout == f"lightllmd {__version__}\n"
    shown = run("--help").stdout
    assert "Capacity and lengths:" in shown
    assert "[http] The HTTP front end.:" not in shown
    assert run("--print-config").stdout.startswith("#:schema")
    assert run("--json-schema").stdout.startswith("{")
    assert run("--feature-table").stdout.startswith("| |")
