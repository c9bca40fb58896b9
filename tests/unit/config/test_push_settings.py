"""The five parameters of pushed metrics: what they may be, and what is refused before anything is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightllmd.config import cli
from lightllmd.config.load import load
from lightllmd.config.parameters import Config
from lightllmd.config.push import METRIC_LABELS, credentials, group
from lightllmd.errors import EXIT_CONFIG, ConfigInvalid
from lightllmd.observe.metrics import ApiMetrics, EngineMetrics, PushMetrics

GATEWAY = 'engine.backend = "fake"\nmetric_gateway = "gateway:9091"\n'
LONG = "x" * 2000


def written(folder: Path, text: str) -> Path:
    file = folder / "lightllmd.toml"
    file.write_text(text)
    return file


def loaded(folder: Path, text: str, environment: dict[str, str] | None = None) -> Config:
    return load(str(written(folder, text)), None, environment)


@pytest.mark.parametrize(
    "address",
    ["gateway:9091", "127.0.0.1:1", "[::1]:65535", "[fe80::1%eth0]:9091", "a-b.example.org.:9091", "push_gateway:9091"],
)
def test_an_address_is_a_host_and_a_port(address: str, tmp_path: Path) -> None:
    config = loaded(tmp_path, f'engine.backend = "fake"\nmetric_gateway = "{address}"\n')
    assert config.params.metric_gateway == address


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("", "is not of the form host:port"),
        ("gateway", '"gateway" is not of the form host:port'),
        ("gateway:", "is not of the form host:port"),
        (":9091", "is not of the form host:port"),
        ("http://gateway:9091", "without scheme and path"),
        ("gateway:9091/metrics", "without scheme and path"),
        ("user:secret@gateway:9091", "is not of the form host:port"),
        ("gate way:9091", "is not of the form host:port"),
        ("gateway:90x1", "is not of the form host:port"),
        ("::1:9091", "an IPv6 address in brackets"),
        ("gateway:0", "port 0 is out of bounds: 1 … 65535"),
        ("gateway:65536", "port 65536 is out of bounds: 1 … 65535"),
        ("[::g]:9091", "an IPv6 address in brackets"),
        ("[1::2::3]:9091", '"[1::2::3]" is no IPv6 address'),
        ("[127.0.0.1]:9091", '"[127.0.0.1]" is no IPv6 address'),
        ("a..b:9091", "is no host name: at most 253 characters, 1 … 63 between two dots"),
        (f"{'x' * 64}:9091", "1 … 63 between two dots"),
        (f"{'x.' * 127}:9091", "at most 253 characters"),
    ],
)
def test_another_address_is_refused_with_the_bound(address: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid) as refused:
        loaded(tmp_path, f'engine.backend = "fake"\nmetric_gateway = "{address}"\n')
    [problem] = refused.value.problems
    assert (problem.key, problem.line) == ("metric_gateway", 2)
    assert said in problem.message


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ('["instance=node7", "zone=a"]', {"instance": "node7", "zone": "a"}),
        ('{instance = "node7", _zone9 = "a"}', {"instance": "node7", "_zone9": "a"}),
        ('["path=/a/b", "query=x=1&y=2", "empty=", "text=ä b\\n"]', None),
        ("[]", {}),
    ],
)
def test_a_grouping_key_is_a_list_or_a_table_of_labels(
    text: str, labels: dict[str, str] | None, tmp_path: Path
) -> None:
    labels = {"path": "/a/b", "query": "x=1&y=2", "empty": "", "text": "ä b\n"} if labels is None else labels
    assert group(loaded(tmp_path, f"{GATEWAY}grouping_key = {text}\n").params) == labels


@pytest.mark.parametrize(
    ("line", "key", "said"),
    [
        ('grouping_key = ["a"]', "grouping_key", '"a" is not of the form "key=value"'),
        ('grouping_key = ["=a"]', "grouping_key", '"=a" is not of the form'),
        ('grouping_key = ["9a=b"]', "grouping_key", "no digit first"),
        ('grouping_key = ["a-b=c"]', "grouping_key", "letters, digits and _"),
        ('grouping_key = ["a b=c"]', "grouping_key", "letters, digits and _"),
        ('grouping_key = ["ä=c"]', "grouping_key", "letters, digits and _"),
        ('grouping_key = {"a@base64" = "Yg"}', "grouping_key", "letters, digits and _"),
        ("grouping_key = {a = 1}", "grouping_key", "1 is an integer"),
        ('grouping_key = "a=b"', "grouping_key", "expected a list of strings"),
        ('grouping_key = ["job=x"]', "grouping_key", "job is set by job_name"),
        ('grouping_key = ["__a=x"]', "grouping_key", "__a begins with __"),
        ('grouping_key = ["le=x"]', "grouping_key", "le is a label of the metrics themselves"),
        ('grouping_key = ["method=x"]', "grouping_key", "method is a label of the metrics themselves"),
        ('grouping_key = ["a=1", "b=1", "a=1"]', "grouping_key", "a occurs 2 times"),
        ('grouping_key = ["a=.."]', "grouping_key", "a = \"..\" can't be a part of the gateway's path"),
        (
            f'grouping_key = ["a={LONG}", "b={LONG}", "c={LONG}", "d={LONG}", "e={LONG}"]',
            "grouping_key",
            "at most 8192",
        ),
        ('job_name = ""', "job_name", "is empty"),
        ('job_name = "."', "job_name", "\".\" can't be a part of the gateway's path"),
        ("push_interval = 0", "push_interval", "0 is out of bounds: 1 … 86400 s"),
        ("push_interval = 0.5", "push_interval", "expected an integer"),
        ("push_interval = 86401", "push_interval", "86401 is out of bounds: 1 … 86400 s"),
        ('enable_monitor_auth = "yes"', "enable_monitor_auth", "expected true or false"),
    ],
)
def test_a_bad_value_is_refused_with_line_value_and_bound(line: str, key: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid) as refused:
        loaded(tmp_path, f"{GATEWAY}{line}\n")
    [problem] = refused.value.problems
    assert (problem.key, problem.line) == (key, 3)
    assert said in problem.message


def test_all_that_is_wrong_with_the_labels_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid) as refused:
        loaded(tmp_path, f'{GATEWAY}grouping_key = ["job=x", "le=..", "le=y"]\n')
    [problem] = refused.value.problems
    for said in ("le occurs 2 times", "job is set by job_name", "le is a label", 'le = ".."'):
        assert said in problem.message


@pytest.mark.parametrize("words", [["--job_name", "a\udcff"], ["--grouping_key", "a=\udcff"]])
def test_bytes_of_the_command_line_that_are_no_text_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigInvalid, match="is not valid UTF-8"):
        cli.parse(["--engine.backend", "fake", "--metric_gateway", "gateway:9091", *words])


def test_flags_are_repeated_as_the_originals_are() -> None:
    words = ["--engine.backend", "fake", "--metric_gateway", "g:1", "--grouping_key", "a=b", "--grouping_key", "c=d"]
    assert group(cli.parse(words).config.params) == {"a": "b", "c": "d"}


def test_no_label_of_a_metric_can_be_a_label_of_the_group() -> None:
    metrics: list[Any] = [ApiMetrics(100, 200), EngineMetrics(), PushMetrics()]
    found = {
        label
        for made in metrics
        for metric in made.registry.collect()
        for sample in metric.samples
        for label in sample.labels
    }
    assert found == set(METRIC_LABELS)


# --- authentication --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "the environment variables USERNAME and PASSWORD must be set"),
        ({"USERNAME": "u"}, "the environment variable PASSWORD must be set"),
        ({"PASSWORD": "p"}, "the environment variable USERNAME must be set"),
        ({"USERNAME": "", "PASSWORD": "p"}, "the environment variable USERNAME must be set"),
        ({"USERNAME": "u:v", "PASSWORD": "p"}, "USERNAME contains a colon"),
        ({"USERNAME": "u", "PASSWORD": "\udcff"}, "PASSWORD is not valid UTF-8"),
    ],
)
def test_authentication_without_its_environment_is_refused_by_name(
    environment: dict[str, str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigInvalid) as refused:
        loaded(tmp_path, f"{GATEWAY}enable_monitor_auth = true\n", environment)
    [problem] = refused.value.problems
    assert (problem.key, problem.line) == ("enable_monitor_auth", 3)
    assert said in problem.message
    loaded(tmp_path, f"{GATEWAY}enable_monitor_auth = false\n", environment)


def test_user_and_password_come_from_the_environment_and_are_no_part_of_the_configuration(tmp_path: Path) -> None:
    environment = {"USERNAME": "ü", "PASSWORD": "se:cret"}
    config = loaded(tmp_path, f"{GATEWAY}enable_monitor_auth = true\n", environment)
    assert credentials(environment).password == "se:cret"
    assert "se:cret" not in repr(config)


@pytest.mark.parametrize("action", ["start", "check", "file alone"])
def test_a_start_and_its_check_look_at_the_environment(action: str, tmp_path: Path) -> None:
    file = str(written(tmp_path, f"{GATEWAY}enable_monitor_auth = true\n"))
    words = {"start": ["--config", file], "check": ["--check", file], "file alone": ["--check", file, "--offline"]}
    bare = {name: value for name, value in os.environ.items() if name not in ("USERNAME", "PASSWORD")}
    done = subprocess.run(
        [sys.executable, "-m", "lightllmd", *words[action]], capture_output=True, text=True, env=bare, timeout=60
    )
    if action == "file alone":
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == EXIT_CONFIG
        assert f"{file}:3: enable_monitor_auth: true: the environment variables USERNAME and PASSWORD" in done.stderr
