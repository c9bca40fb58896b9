"""What a changed file means: each difference with its class, the same flags over it, and what a reload refuses."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from lightllmd.config import cli
from lightllmd.config.diff import Change, blend, diff
from lightllmd.config.load import load
from lightllmd.config.models import with_model
from lightllmd.config.parameters import Config
from lightllmd.config.setting import by_key, fields
from lightllmd.errors import ConfigInvalid

MODELS = '[models.a]\nmodel_dir = "/a"\n[models.b]\nmodel_dir = "/b"\ntokenizer_mode = "fast"\n'


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "a.toml"
    file.write_text(text)
    return str(file)


def test_lines_and_comments_are_no_difference(tmp_path: Path) -> None:
    old = load(write(tmp_path, 'model_dir = "m"\nport = 8001\n' + MODELS))
    new = load(write(tmp_path, '# moved\nport = 8001\n\nmodel_dir = "m"\nhost = "127.0.0.1"\n\n' + MODELS))
    assert old.places != new.places
    assert diff(old, new) == []


def test_each_difference_has_its_class_in_the_order_of_the_declaration(tmp_path: Path) -> None:
    old = load(write(tmp_path, 'model_dir = "m"\n'))
    new = load(write(tmp_path, 'data_type = "fp32"\nmodel_dir = "m"\nport = 1\n[log]\nlevel = "debug"\n'))
    assert diff(old, new) == [
        Change("port", 8000, 1, "front end"),
        Change("data_type", "auto", "fp32", "engine"),
        Change("log.level", "info", "debug", "live"),
    ]
    assert msgspec.to_builtins(diff(old, new)[0]) == {"key": "port", "old": 8000, "new": 1, "reload": "front end"}


def test_tables_of_models_are_live_and_told_one_by_one(tmp_path: Path) -> None:
    old = load(write(tmp_path, 'model_dir = "m"\n' + MODELS))
    changed = MODELS.replace("[models.a]", "[models.c]").replace('"fast"', '"slow"\ndata_type = "fp16"')
    new = load(write(tmp_path, 'model_dir = "m"\n' + changed))
    assert diff(old, new) == [
        Change("models.a", {"model_dir": "/a"}, None, "live"),
        Change("models.b.tokenizer_mode", "fast", "slow", "live"),
        Change("models.b.data_type", None, "fp16", "live"),
        Change("models.c", None, {"model_dir": "/a"}, "live"),
    ]


def test_a_change_of_the_served_models_table_is_a_change_of_the_engine(tmp_path: Path) -> None:
    old = with_model(load(write(tmp_path, 'model_dir = "m"\n' + MODELS)), "b")
    new = with_model(load(write(tmp_path, 'model_dir = "m"\n' + MODELS.replace('"fast"', '"slow"'))), "b")
    assert [(change.key, change.reload) for change in diff(old, new)] == [
        ("tokenizer_mode", "engine"),
        ("models.b.tokenizer_mode", "live"),
    ]


def test_all_changes_together_are_the_new_configuration(tmp_path: Path) -> None:
    old = load(write(tmp_path, 'model_dir = "m"\n' + MODELS))
    new = load(write(tmp_path, 'model_dir = "n"\n[http]\nworkers = 2\n[engine.fake]\npoison = "x"\n'))
    both = blend(old, new, diff(old, new))
    assert diff(both, new) == []
    assert blend(old, new, []) == old


CLASSES = {
    "supervisor.control_socket": "restart",
    "supervisor.drain_timeout": "live",
    "supervisor.spare_engine": "live",
    "supervisor.swap": "live",
    "supervisor.log_lines": "live",
    "log.level": "live",
    "log.format": "live",
    "disable_log_stats": "live",
    "log_stats_interval": "live",
    "health_monitor": "live",
    "host": "front end",
    "port": "front end",
    "http.workers": "front end",
    "http.api_keys_file": "live",
    "http.metrics_key": "live",
    "http.unknown_fields": "front end",
    "http.served_model_name": "front end",
    "http.hold_timeout": "front end",
    "http.max_queue": "engine",
    "http.queue_timeout": "engine",
    "http.priority_ageing": "engine",
    "model_dir": "engine",
    "tokenizer_mode": "engine",
    "data_type": "engine",
    "mode": "engine",
    "tp": "engine",
    "nccl_port": "engine",
    "engine.replicas": "engine",
    "engine.degrade": "live",
}


@pytest.mark.parametrize(("key", "reload"), CLASSES.items())
def test_the_class_of_a_setting(key: str, reload: str) -> None:
    assert by_key(Config)[key].setting.reload == reload


def test_whole_tables_of_one_class() -> None:
    engine = [one for one in fields(Config) if one.table.startswith("engine")]
    assert [one.key for one in engine if one.setting.reload != "engine"] == ["engine.degrade"]
    assert {one.setting.reload for one in fields(Config) if one.table == "log"} == {"live"}
    assert [one.key for one in fields(Config) if one.setting.reload == "restart"] == ["supervisor.control_socket"]


# --- reading the file again -----------------------------------------------------------------------------------


def test_flags_override_the_changed_file_too(tmp_path: Path) -> None:
    file = write(tmp_path, 'model_dir = "m"\n')
    invocation = cli.parse(["--config", file, "--port", "9000", "--eos_id", "2", "7"])
    write(tmp_path, 'model_dir = "m"\nport = 8001\neos_id = [3]\njob_name = "x"\n')
    config = cli.reload(invocation)
    assert (config.params.port, config.params.eos_id, config.params.job_name) == (9000, [2, 7], "x")
    assert invocation.config.params.job_name == "lightllm"


def test_a_bad_file_is_refused_with_all_its_problems(tmp_path: Path) -> None:
    invocation = cli.parse(["--config", write(tmp_path, 'model_dir = "m"\n')])
    write(tmp_path, "port = 70000\nprot = 1\n")
    with pytest.raises(ConfigInvalid) as raised:
        cli.reload(invocation)
    assert [one.key for one in raised.value.problems] == ["model_dir", "port", "prot"]
    Path(str(invocation.config_file)).unlink()
    with pytest.raises(ConfigInvalid, match="can't be read"):
        cli.reload(invocation)


def test_without_a_file_there_is_nothing_to_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "DEFAULT_FILE", str(tmp_path / "none.toml"))
    with pytest.raises(ConfigInvalid, match="there is no file to read again"):
        cli.reload(cli.parse(["--model_dir", "m"]))


def test_what_needs_a_new_daemon_is_refused_by_name_and_line(tmp_path: Path) -> None:
    file = write(tmp_path, 'model_dir = "m"\n')
    invocation = cli.parse(["--config", file])
    write(tmp_path, 'model_dir = "m"\nport = 1\n[supervisor]\ncontrol_socket = "/tmp/x.sock"\n')
    with pytest.raises(ConfigInvalid) as raised:
        cli.reload(invocation)
    (one,) = raised.value.problems
    assert (one.file, one.line, one.key) == (file, 4, "supervisor.control_socket")
    assert one.message == '"" -> "/tmp/x.sock" can\'t be changed while lightllmd runs; restart it'
    overridden = cli.parse(["--config", file, "--supervisor.control_socket", "/tmp/y.sock"])
    assert cli.reload(overridden).supervisor.control_socket == "/tmp/y.sock"


def test_the_content_of_a_key_file_is_configuration(tmp_path: Path) -> None:
    """Kept as digests; what a reload finds is a change although the file's name is the same."""
    keys = tmp_path / "keys"
    keys.write_bytes(b"\xef\xbb\xbfone\n# a comment\n\ntwo\n")
    keys.chmod(0o640)
    flags = {"engine.backend": "fake", "http.api_keys_file": str(keys)}
    old = load(None, flags)
    assert [key.sha256 for key in old.keys.requests] == [hashlib.sha256(key).hexdigest() for key in (b"one", b"two")]
    assert old.warnings == []
    assert diff(old, load(None, flags)) == []
    keys.write_text("two\nthree\nfour\n")
    keys.chmod(0o644)
    new = load(None, flags)
    assert diff(old, new) == [Change("http.api_keys_file", "2 keys", "3 keys (2 new, 1 gone)", "live")]
    [warning] = new.warnings
    assert f"read the keys in {keys}: chmod" in warning
    assert "three" not in repr(new)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda path: path.write_text("# none\n"), "has no key"),
        (lambda path: path.write_bytes(b"\xff\n"), "is not valid UTF-8"),
        (os.mkfifo, "it is a pipe"),
        (lambda path: path.mkdir(), "it is a directory"),
        (lambda path: path.write_bytes(b"x" * (1 << 20) + b"x"), "larger than"),
        (lambda path: None, "does not exist"),
    ],
)
@pytest.mark.parametrize("setting", ["http.api_keys_file", "http.metrics_key"])
def test_a_key_file_that_cant_be_used_is_a_fault_of_its_setting(
    tmp_path: Path, make: Callable[[Path], object], part: str, setting: str
) -> None:
    make(tmp_path / "keys")
    with pytest.raises(ConfigInvalid) as refused:
        load(None, {"engine.backend": "fake", setting: str(tmp_path / "keys")})
    (problem,) = refused.value.problems
    assert (problem.key, part in problem.message) == (setting, True)
