"""A checkpoint with its own config and tokenizer through the whole daemon: refused, trusted, killed, made worse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from closed_loop import Operator, Timeline
from harness import Daemon, wait_for
from lightllmd.errors import CTL_CONFIG_INVALID, EXIT_CONFIG
from long_run import LONG
from remote_checkpoints import TEMPLATE, TOKENIZER_CODE, write_tokenizer

# Each process that runs it says which it is.
TRACE = """\
import os
with open({path!r}, "a") as trace:
    command = open("/proc/self/cmdline").read().split("\\0")
    trace.write(f"{{os.getpid()}} {{command[2]}}\\n")
"""
CONFIG = """
from transformers import PretrainedConfig
class OddConfig(PretrainedConfig):
    model_type = "llama"
    def __init__(self, **rest):
        super().__init__(**(rest | {"vocab_size": 257}))
"""
FLAGS = ["--load_way", "DUMMY", "--engine.device", "cpu", "--engine.threads", "1", "--max_total_token_num", "4000"]
FLAGS += ["--max_req_input_len", "1000", "--max_req_total_len", "2000", "--data_type", "fp32"]


def write(folder: Path, first: str = "") -> Path:
    trace = TRACE.format(path=str(folder.parent / "trace"))
    write_tokenizer(folder, f"{trace}{first}\n{TOKENIZER_CODE}")
    (folder / "configuration_odd.py").write_text(f"{trace}{CONFIG}")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"vocab_size": "odd", "auto_map": {"AutoConfig": "configuration_odd.OddConfig"}}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def traced(folder: Path) -> dict[int, str]:
    """Which processes ran the code: pid -> the module that the process was started as."""
    if not (folder.parent / "trace").exists():
        return {}
    lines = (folder.parent / "trace").read_text().splitlines()
    return {int(pid): module for pid, module in (line.split() for line in lines)}


def guards(daemon: Daemon) -> list[psutil.Process]:
    found = []
    for process in daemon.processes():
        try:
            if "lightllmd.code_host" in process.cmdline() and "lightllmd.code_host" not in process.parent().cmdline():
                found.append(process)
        except (psutil.Error, AttributeError):
            continue
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("remote") / "model")


@pytest.fixture(scope="module")
def daemon(folder: Path) -> Iterator[Daemon]:
    flags = ["--model_dir", str(folder), "--trust_remote_code", *FLAGS]
    with Daemon(folder.parent / "daemon", *flags, fake=False).start() as daemon:
        yield daemon


def test_without_the_switch_the_start_is_refused_and_nothing_ran(folder: Path) -> None:
    before = traced(folder)
    daemon = Daemon(folder.parent / "refused", "--model_dir", str(folder), *FLAGS, fake=False)
    done = subprocess.run(daemon.command, capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_CONFIG
    [line] = [line for line in done.stderr.splitlines() if "brings code" in line]
    for part in ("OddConfig of configuration_odd.py (config.json: AutoConfig)", "OddTokenizer of tokenization_odd.py"):
        assert part in line
    assert line.endswith("which runs only with trust_remote_code = true")
    assert traced(folder) == before


def test_with_it_texts_are_served_and_only_hosts_run_the_code(daemon: Daemon, folder: Path) -> None:
    body = {"inputs": "An odd text", "parameters": {"max_new_tokens": 8, "ignore_eos": True, "return_details": True}}
    plain = httpx.post(f"{daemon.url}/generate", json=body, timeout=60)
    assert plain.status_code == 200, plain.text
    ids = [token["id"] for token in plain.json()["tokens"]]
    assert plain.json()["generated_text"] == ["".join(chr(number) for number in ids if number < 256)]
    assert plain.json()["prompt_tokens"] == len("An odd text")
    chat = {"model": "any", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    told = httpx.post(f"{daemon.url}/v1/chat/completions", json=chat, timeout=60)
    assert told.status_code == 200, told.text
    assert told.json()["usage"]["prompt_tokens"] == len("user=Hi;")
    assert httpx.get(f"{daemon.url}/tokenizer_info", timeout=60).json()["chat_template"] == TEMPLATE
    ran = traced(folder)
    assert set(ran.values()) == {"lightllmd.code_host"}
    assert not {worker["pid"] for kind in ("api", "engine") for worker in daemon.workers(kind)} & set(ran)
    assert len(guards(daemon)) == 1


def test_a_killed_api_worker_leaves_no_host_and_the_next_has_its_own(daemon: Daemon) -> None:
    [before] = guards(daemon)
    daemon.kill("api", signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(before.pid), what="the end of the host")
    daemon.wait_ready()
    assert httpx.post(f"{daemon.url}/generate", json={"inputs": "ab"}, timeout=60).status_code == 200
    [after] = guards(daemon)
    assert after.pid != before.pid


def test_a_killed_host_costs_no_request(daemon: Daemon) -> None:
    [guard] = guards(daemon)
    os.kill(guard.pid, signal.SIGKILL)
    assert httpx.post(f"{daemon.url}/generate", json={"inputs": "ab"}, timeout=60).status_code == 200
    wait_for(lambda: len(guards(daemon)) == 1, what="one host")


def test_changed_code_that_is_worse_is_refused_by_a_reload_and_better_is_taken(daemon: Daemon, folder: Path) -> None:
    operator = Operator(daemon, Timeline("the code"))
    code = folder / "tokenization_odd.py"
    good = code.read_text()
    code.write_text(f"import os; os._exit(7)\n{good}")
    refused = operator.reload(code=CTL_CONFIG_INVALID)
    assert (
        "running the code that it brings, tokenization_odd.OddTokenizer, failed: its process ended with status 7"
        in str(refused)
    )
    assert httpx.post(f"{daemon.url}/generate", json={"inputs": "ab"}, timeout=60).status_code == 200
    if LONG:
        code.write_text(good.replace("for letter in text]", "for letter in text * 2]"))
        operator.reload()
        answer = httpx.post(f"{daemon.url}/tokens", json={"text": "abc"}, timeout=60)
        assert answer.json() == {"ntokens": 6}
    code.write_text(good)
