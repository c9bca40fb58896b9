"""Every broken configuration file ends `lightllmd --check` with 78 and a line that says where and what."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightllmd.__main__ import main
from lightllmd.config.document import MAX_FILE_BYTES
from lightllmd.config.load import load
from lightllmd.errors import EXIT_CONFIG, ConfigInvalid, Problem

MODEL = 'model_dir = "m"\n'

# name -> (text, line, key, part of the message)
BROKEN: dict[str, tuple[str, int | None, str, str]] = {
    "unknown-key": (MODEL + "prot = 9000\n", 2, "prot", "nearest: port"),
    "unknown-long-key": (MODEL + "max_total_token_nums = 1\n", 2, "max_total_token_nums", "max_total_token_num"),
    "unknown-key-with-dashes": (MODEL + "max-req-total-len = 1\n", 2, "max-req-total-len", "max_req_total_len"),
    "key-of-another-table": (MODEL + "workers = 2\n", 2, "workers", "nearest: http.workers"),
    "top-level-key-below-a-table": ("[http]\n" + MODEL, 2, "http.model_dir", "write it above the first [table]"),
    "unknown-table": (MODEL + "\n[htpp]\nworkers = 1\n", 3, "htpp", "nearest: [http]"),
    "unknown-nested-table": (MODEL + "[engine.fak]\npoison = 'x'\n", 2, "engine.fak", "nearest: [engine.fake]"),
    "scalar-for-table": (MODEL + "http = 3\n", 2, "http", "3 is an integer, expected a table"),
    "table-for-scalar": (MODEL + "[port]\na = 1\n", 2, "port", "a table, expected an integer"),
    "string-for-integer": (MODEL + 'port = "8000"\n', 2, "port", '"8000" is a string, expected an integer'),
    "boolean-for-integer": (MODEL + "port = true\n", 2, "port", "true is a boolean, expected an integer"),
    "number-for-integer": (MODEL + "max_req_input_len = 10.0\n", 2, "max_req_input_len", "expected an integer"),
    "quoted-switch": (MODEL + 'disable_log_stats = "true"\n', 2, "disable_log_stats", "write true without quotes"),
    "integer-for-switch": (MODEL + "disable_log_stats = 1\n", 2, "disable_log_stats", "expected true or false"),
    "date-for-string": (MODEL + "job_name = 2026-01-01\n", 2, "job_name", "a date or time, expected a string"),
    "integer-for-list": (MODEL + "eos_id = 2\n", 2, "eos_id", 'expected "auto" or a list of integers'),
    "string-in-integer-list": (MODEL + "eos_id = [\n  2, # ]\n  'x',\n]\n", 4, "eos_id", '"x" is a string'),
    "empty-list": (MODEL + "eos_id = []\n", 2, "eos_id", "at least one"),
    "below-bounds": (MODEL + "running_max_req_size = 0\n", 2, "running_max_req_size", "1 … 65536"),
    "above-bounds": (MODEL + "port = 65536\n", 2, "port", "65536 is out of bounds: 0 … 65535"),
    "negative-eos": (MODEL + "eos_id = [2, -1]\n", 2, "eos_id", "-1 is out of bounds"),
    "ratio-above-one": (MODEL + "router_token_ratio = 1.5\n", 2, "router_token_ratio", "0 … 1"),
    "nan": (MODEL + "router_token_ratio = nan\n", 2, "router_token_ratio", "no finite number"),
    "infinite": (MODEL + "[supervisor]\nhang_timeout = inf\n", 3, "supervisor.hang_timeout", "no finite number"),
    "zero-timeout": (MODEL + "[supervisor]\nhang_timeout = 0\n", 3, "supervisor.hang_timeout", "> 0"),
    "unknown-choice": (MODEL + 'data_type = "fp61"\n', 2, "data_type", 'nearest: "fp16"'),
    "unknown-word": (MODEL + 'max_total_token_num = "atuo"\n', 2, "max_total_token_num", 'nearest: "auto"'),
    "host-with-scheme": (MODEL + 'host = "http://127.0.0.1"\n', 2, "host", "without scheme and port"),
    "empty-host": (MODEL + 'host = ""\n', 2, "host", "is empty"),
    "nul-in-path": ('model_dir = "a\\u0000b"\n', 1, "model_dir", "NUL"),
    "cors-origin-with-path": (
        MODEL + '[http]\ncors_origins = ["https://a/b"]\n',
        3,
        "http.cors_origins",
        "https://a/b",
    ),
    "missing-model": ("port = 1\n", None, "model_dir", "is missing"),
    "missing-keys-file": (MODEL + '[http]\napi_keys_file = "/no/such"\n', 3, "http.api_keys_file", "does not exist"),
    "missing-metrics-keys": (MODEL + '[http]\nmetrics_key = "/no/such"\n', 3, "http.metrics_key", "does not exist"),
    "metrics-key-in-the-file": (
        MODEL + '[http]\nmetrics_key = "s3cret"\n',
        3,
        "http.metrics_key",
        "path of a key file",
    ),
    "input-not-below-total": (MODEL + "max_req_input_len = 3072\n", 2, "max_req_input_len", "less than"),
    "total-above-slots": (
        MODEL + "max_total_token_num = 3000\n",
        2,
        "max_total_token_num",
        "at most max_total_token_num",
    ),
    "prefill-below-total": (MODEL + "batch_max_tokens = 3071\n", 2, "batch_max_tokens", "at least max_req_total_len"),
    "prefill-below-a-block": (
        MODEL + "batch_max_tokens = 255\nsplitfuse_mode = true\n",
        2,
        "batch_max_tokens",
        "must be at least splitfuse_block_size = 256",
    ),
    "backoff-order": (
        MODEL + "[supervisor]\nbackoff_max = 1\nbackoff_initial = 2\n",
        3,
        "supervisor.backoff_max",
        "must be at most",
    ),
    "long-socket-path": (
        MODEL + f'[supervisor]\ncontrol_socket = "/{"x" * 107}"\n',
        3,
        "supervisor.control_socket",
        "108 bytes",
    ),
    "a-mode-of-generation-of-a-reward-model": (
        MODEL + "use_reward_model = true\nbeam_mode = true\n",
        3,
        "beam_mode",
        "use_reward_model and beam_mode exclude each other: a reward model generates nothing",
    ),
    "two-modes-of-generation": (
        MODEL + "beam_mode = true\ndiverse_mode = true\n",
        3,
        "diverse_mode",
        "exclude each other",
    ),
    "auth-without-gateway": (MODEL + "enable_monitor_auth = true\n", 2, "enable_monitor_auth", "metric_gateway"),
    "grouping-key-form": (MODEL + 'grouping_key = ["a"]\n', 2, "grouping_key", "key=value"),
    "grouping-key-table": (MODEL + "grouping_key = {a = 1}\n", 2, "grouping_key", "1 is an integer"),
    "unknown-mode": (MODEL + 'mode = ["triton_int8kb"]\n', 2, "mode", 'nearest: "triton_int8kv"'),
    "a-mode-that-is-not-built": (
        MODEL + 'mode = ["triton_int8kv",\n"flash_llm_w6a16"]\n',
        3,
        "mode",
        '"flash_llm_w6a16" is not available: 6-bit',
    ),
    "groups-of-no-mode": (MODEL + 'mode = ["ppl_fp16", "g64"]\n', 2, "mode", "no mode for weights is named"),
    "groups-of-8-bits": (MODEL + 'mode = ["g64", "triton_w8a16"]\n', 2, "mode", "triton_w8a16 has none"),
    "two-groups": (MODEL + 'mode = ["triton_w4a16", "g64", "g32"]\n', 2, "mode", "g64 and g32 exclude each other"),
    "group-size": (
        MODEL + 'mode = ["triton_w4a16", "g48"]\n',
        2,
        "mode",
        "16, 32, 64, 128, 256, 512 or 1024 inputs",
    ),
    "two-weight-modes": (
        MODEL + 'mode = ["triton_w4a16", "triton_int8weight"]\n',
        2,
        "mode",
        "triton_w4a16 and triton_w8a16 exclude each other: each says how weights are stored",
    ),
    "a-cache-mode-and-a-decode-mode": (
        MODEL + 'mode = ["triton_gqa_flashdecoding", "triton_int8kv"]\n',
        2,
        "mode",
        "triton_gqa_flashdecoding and triton_int8kv exclude each other: each says how the KV cache",
    ),
    "two-decode-modes": (
        MODEL + 'mode = ["triton_gqa_attention", "ppl_fp16"]\n',
        2,
        "mode",
        "triton_gqa_attention and ppl_fp16 exclude each other",
    ),
    "mode-with-another-data-type": (
        MODEL + 'mode = ["ppl_fp16"]\ndata_type = "bf16"\n',
        3,
        "data_type",
        'computes in float16, not in data_type = "bf16"',
    ),
    "images-of-no-kind": (MODEL + 'enable_multimodal = "yes"\n', 2, "enable_multimodal", '"auto" or true or false'),
    "image-cache-without-room": (MODEL + "cache_capacity = 0\n", 2, "cache_capacity", "out of bounds: 1 …"),
    "more-than-all-reserved": (MODEL + "cache_reserved_ratio = 1.5\n", 2, "cache_reserved_ratio", "out of bounds"),
    "network-with-host-bits-wrong": (
        MODEL + '[images]\nallowed_networks = ["10.0.0.0/40"]\n',
        3,
        "images.allowed_networks",
        "10.0.0.0/40",
    ),
    "host-with-a-scheme": (
        MODEL + '[images]\nallowed_hosts = ["http://example.org"]\n',
        3,
        "images.allowed_hosts",
        "without scheme and port",
    ),
    "syntax": (MODEL + "port = \n", 2, "", "TOML syntax"),
    "unclosed-string": (MODEL + 'host = "a\n', 2, "", "TOML syntax"),
    "unclosed-array": (MODEL + "eos_id = [1,\n2\n", 3, "", "TOML syntax"),
    "key-twice": (MODEL + "port = 1\nport = 2\n", 3, "", "TOML syntax"),
    "bare-switch": (MODEL + "disable_log_stats\n", 2, "", "TOML syntax"),
    "deep-nesting": (MODEL + "eos_id = " + "[" * 5000 + "]" * 5000 + "\n", None, "", ""),
    "huge-integer": (MODEL + "port = " + "9" * 5000 + "\n", None, "", ""),
}


def problems_of(file: Path) -> list[Problem]:
    with pytest.raises(ConfigInvalid) as raised:
        load(str(file))
    return raised.value.problems


def write(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "broken.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def checked_by_a_process(file: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "lightllmd", "--check", str(file), "--offline"]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


Check = Callable[[Path], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """As `checked_by_a_process`, in this one."""

    def checked(file: Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["lightllmd", "--check", str(file), "--offline"])
        return subprocess.CompletedProcess(sys.argv, main(), *capsys.readouterr())

    return checked


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_exits_78_with_line_and_key(name: str, tmp_path: Path, check: Check) -> None:
    text, line, key, part = BROKEN[name]
    file = write(tmp_path, text)
    done = check(file)
    assert done.returncode == EXIT_CONFIG, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    place = f"{file}:{line}: " if line else f"{file}"
    assert any(
        said.startswith(place) and (not key or f" {key}: " in said) and part in said
        for said in done.stderr.splitlines()
    ), done.stderr


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, 'prot = 1\nport = "x"\neos_id = [-1, "y"]\n[http]\nworkers = 0\n')
    found = problems_of(file)
    assert [(one.line, one.key) for one in found] == [
        (None, "model_dir"),
        (1, "prot"),
        (2, "port"),
        (3, "eos_id"),
        (3, "eos_id"),
        (5, "http.workers"),
    ]
    assert {one.file for one in found} == {str(file)}


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "lightllmd.toml"
    file.write_bytes("\ufeffport = 9000\r\nprot = 1\r\n".encode())
    with pytest.raises(ConfigInvalid) as invalid:
        load(str(file), {"engine.backend": "fake"})
    assert [(problem.key, problem.line) for problem in invalid.value.problems] == [("prot", 2)]


def test_invalid_utf8_names_byte_and_line(tmp_path: Path) -> None:
    (one,) = problems_of(write(tmp_path, b'model_dir = "m"\njob_name = "\xff"\n'))
    assert one.line == 2
    assert "0xff is not valid UTF-8" in one.message


@pytest.mark.parametrize("name", ["missing.toml", "folder"])
def test_a_file_that_cant_be_read_is_a_problem(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    done = checked_by_a_process(tmp_path / name)
    assert done.returncode == EXIT_CONFIG
    assert f"{tmp_path / name}: can't be read: " in done.stderr


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    large = tmp_path / "large.toml"
    large.touch()
    os.truncate(large, 1 << 40)
    (one,) = problems_of(large)
    assert str(MAX_FILE_BYTES) in one.message


@pytest.mark.parametrize(
    "text",
    [
        MODEL,
        MODEL + 'long_truncation_mode = "None"\n',
        MODEL + "grouping_key = []\n",
        MODEL + "splitfuse_block_size = 128\npush_interval = 5\njob_name = 'x'\n",
        MODEL + "load_way = 'DUMMY'\n",
        MODEL + "mode = ['triton_flashdecoding']\n",
        MODEL + "mode = ['ppl_fp16', 'ppl_fp16']\ndata_type = 'fp16'\n",
        MODEL + "[engine]\ncuda_graphs = false\noverlap = false\ngraph_max_rows = 256\n",
        MODEL + "splitfuse_mode = true\nbatch_max_tokens = 256\n",
        MODEL + "router_token_ratio = 1\n[supervisor]\nhang_timeout = 3\n",
        '[engine]\nbackend = "fake"\n',
        "engine.backend = 'fake'\nengine.fake.poison = 'x'\n",
    ],
)
def test_a_valid_file_passes(text: str, tmp_path: Path, check: Check) -> None:
    file = write(tmp_path, text)
    done = check(file)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{file}: valid\n", "")


def test_a_text_of_any_length_is_refused_in_a_short_line(tmp_path: Path) -> None:
    (one,) = problems_of(write(tmp_path, b'model_dir = "/' + b"m" * 900_000 + b'"\n'))
    assert "is longer than 4096 bytes" in one.message
    assert len(one.message) < 300


@pytest.mark.parametrize(
    "text",
    [b"[models.%b]\n", b'[models."%b "]\nmodel_dir = "/m"\n', b"[models]\n%b = 1\n", b"%b = 1\n", b"[http]\n%b = 1\n"],
    ids=["model", "name", "no-table", "setting", "setting-of-a-table"],
)
def test_a_key_of_any_length_is_told_in_a_short_line(text: bytes, tmp_path: Path) -> None:
    told = problems_of(write(tmp_path, b'model_dir = "m"\n' + text % (b"n" * 900_000)))
    assert told
    assert all(len(str(one)) < 500 + len(str(tmp_path)) for one in told)
