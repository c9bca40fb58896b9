"""Every parameter of LightLLM's page does what the page says, which one small start shows.

A start here is the daemon's: a TOML file, the probe, the plan. What shows the effect is the part that the plan goes to.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from base64 import b64encode
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from prometheus_client import CollectorRegistry, Gauge

from deepspeed_layout import write_deepspeed
from lightllmd.api.app import dialects_of
from lightllmd.api.dialects.native import routes as native
from lightllmd.api.dialects.tgi import routes as tgi
from lightllmd.config.images import reserved
from lightllmd.config.load import load
from lightllmd.config.parameters import Config, Params
from lightllmd.config.plan import Plan, encode_plan
from lightllmd.config.resolve import resolve
from lightllmd.engine.ranks import rendezvous
from lightllmd.engine.runners.fake_model import fake_token
from lightllmd.engine.scheduling.admission import SchedulerLimits
from lightllmd.engine.worker import EngineWorker
from lightllmd.errors import ConfigInvalid, InvalidRequest
from lightllmd.ipc import messages
from lightllmd.ipc.messages import FINISH_STOP, SamplingParams
from lightllmd.probe import model
from lightllmd.probe.facts import Request, probe
from lightllmd.push.gateway import Attempt
from lightllmd.push.pace import PushPace
from lightllmd.requests.asked import Asked, FieldNames, Prompt
from lightllmd.requests.branch import TextOptions
from lightllmd.requests.intake import AdmittedJob, Intake
from lightllmd.requests.limits import RequestLimits
from lightllmd.requests.text_work import Inline, without_waiting
from lightllmd.supervisor.change.planning import request
from lightllmd.supervisor.host.listeners import bind
from lightllmd.supervisor.workers import pusher
from lightllmd.supervisor.workers.health_monitor import Monitor
from lightllmd.text import ByteTokenizer, load_tokenizer
from lightllmd.text.spm import PieceTokenizer
from model_folders import write_folder
from piece_models import train
from remote_checkpoints import CONFIG_CODE, write_code
from resolved import architecture_of
from scheduler_samples import Steps, submit

EVIDENCE: dict[str, Callable[[Path], None]] = {}
SMALL = {"load_way": "DUMMY", "max_total_token_num": 1000, "max_req_input_len": 400, "max_req_total_len": 600}


def evidence(shows: Callable[[Path], None]) -> Callable[[Path], None]:
    """`shows` has the parameter's name; it gets a folder with a tiny llama in ``model``."""
    EVIDENCE[shows.__name__] = shows
    return shows


def configured(folder: Path, environment: dict[str, str] | None = None, **written: Any) -> Config:
    values = {"model_dir": str(folder / "model"), **SMALL, **written}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    file = folder / "lightllmd.toml"
    file.write_text(f'{text}[engine]\ndevice = "cpu"\n')
    return load(str(file), None, environment)


def start(folder: Path, **written: Any) -> Plan:
    config = configured(folder, **written)
    return resolve(config, probe(msgspec.convert(request(config, {}), Request)))


def steps(plan: Plan, *requests: messages.Submit) -> Steps:
    return Steps(*requests, **SchedulerLimits.of(plan)._asdict())


def job(plan: Plan, prompt: str = "hello world", **params: Any) -> AdmittedJob:
    tokenizer = ByteTokenizer()
    names = FieldNames("n", "max_new_tokens")
    asked = Asked([Prompt(prompt, "prompt", True)], SamplingParams(**params), TextOptions(), names, None, new_tokens=8)
    intake = Intake(plan, lambda: tokenizer, Inline(lambda: tokenizer, RequestLimits.of(plan)))
    (made,) = without_waiting(intake.jobs(asked))
    return made


def refused_as(key: str, folder: Path, **written: Any) -> str:
    with pytest.raises(ConfigInvalid) as refused:
        start(folder, **written)
    (problem,) = refused.value.problems
    assert problem.key == key
    return problem.message


# --- serving ----------------------------------------------------------------------------------------------------------


def listening(folder: Path, **written: Any) -> tuple[str, int]:
    params = start(folder, **written).config.params
    (listener,) = bind(params.host, params.port)
    with listener:
        host, port = listener.getsockname()[:2]
    return host, port


@evidence
def host(folder: Path) -> None:
    assert listening(folder, host="127.0.0.2", port=0)[0] == "127.0.0.2"


@evidence
def port(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    assert listening(folder, port=number) == ("127.0.0.1", number)


@evidence
def nccl_port(folder: Path) -> None:
    """Rank 0 listens there; each replica's has a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    plan = start(folder, nccl_port=number, tp=2)
    with rendezvous.listen(plan.rendezvous_port(0)) as listener:
        assert listener.getsockname() == ("127.0.0.1", number)
    assert plan.rendezvous_port(1) == number + 1


@evidence
def use_tgi_api(folder: Path) -> None:
    assert dialects_of(start(folder, use_tgi_api=True))[0] is tgi.DIALECT
    assert dialects_of(start(folder))[0] is native.GENERATING


class Sending:
    """An api worker's process."""

    def __init__(self, sent: list[Any]) -> None:
        self.send, self.said = sent.append, list[Any]()


@evidence
def health_monitor(folder: Path) -> None:
    """Each api worker is sent a request of ours."""
    for on in (True, False):
        sent: list[Any] = []
        child = Sending(sent)
        api = SimpleNamespace(worker=SimpleNamespace(ready=True, child=child), rolling=False)
        engine = SimpleNamespace(ready=True, number=1, vitals=SimpleNamespace(moved=9.0), stats={})
        context = SimpleNamespace(config=start(folder, health_monitor=on).config, clock=SimpleNamespace(now=10.0))
        monitor = Monitor(
            context,  # type: ignore[arg-type]
            SimpleNamespace(serving=SimpleNamespace(engines=[SimpleNamespace(child=engine)])),  # type: ignore[arg-type]
            SimpleNamespace(apis=[api], children=list),  # type: ignore[arg-type]
        )
        monitor.tick(steady=True)
        assert sent == ([messages.Probe(1, generation=1)] if on else [])


# --- the model --------------------------------------------------------------------------------------------------------


@evidence
def tp(folder: Path) -> None:
    """Two processes, which share a CPU."""
    plan = start(folder, tp=2)
    assert (plan.ranks, plan.devices, plan.threads) == (2, [], max(1, plan.device.cpu_threads // 2))


@evidence
def model_dir(folder: Path) -> None:
    (folder / "model").rename(folder / "other")
    plan = start(folder, model_dir=str(folder / "other"))
    assert plan.model is not None
    assert (plan.model.path, plan.vocab_size) == (str(folder / "other"), 257)
    assert "does not exist" in refused_as("model_dir", folder)


@evidence
def tokenizer_mode(folder: Path) -> None:
    train(folder / "model" / "tokenizer.model")
    for mode, exact in (("slow", True), ("fast", False), ("auto", False)):
        assert isinstance(load_tokenizer(start(folder, tokenizer_mode=mode)), PieceTokenizer) == exact


@evidence
def load_way(folder: Path) -> None:
    def form(way: str) -> str:
        facts = start(folder, load_way=way).model
        assert facts is not None
        return facts.format

    write_folder(folder / "model")
    assert (form("HF"), form("DUMMY")) == ("safetensors", "dummy")
    (folder / "model" / "model.safetensors").unlink()
    config = json.loads((folder / "model" / "config.json").read_text())
    write_deepspeed(folder / "model", config, dtype=torch.bfloat16)
    assert form("DS") == "deepspeed"


@evidence
def trust_remote_code(folder: Path) -> None:
    """The checkpoint's own settings class has the sizes; its process is a stand-in's."""
    code = {"auto_map": {"AutoConfig": "configuration_odd.OddConfig"}, "hidden_size": None}
    write_code(folder / "model", {"configuration_odd.py": CONFIG_CODE}, config=code)
    assert "OddConfig of configuration_odd.py" in refused_as("trust_remote_code", folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model, "ask", lambda task, directory, **_: {"hidden_size": 16 * len(task)})
        plan = start(folder, trust_remote_code=True)
    assert plan.model is not None
    assert plan.model.hf_config["hidden_size"] == 16 * len("config")


@evidence
def data_type(folder: Path) -> None:
    wide, narrow = start(folder, data_type="fp32"), start(folder, data_type="bf16")
    assert (wide.data_type, narrow.data_type) == ("float32", "bfloat16")
    assert wide.budget.row("weights") == 2 * narrow.budget.row("weights")


@evidence
def use_reward_model(folder: Path) -> None:
    assert "no head that scores" in refused_as("use_reward_model", folder, use_reward_model=True)
    write_folder(folder / "model", architectures=["LlamaForSequenceClassification"], num_labels=3)
    plan = start(folder, use_reward_model=True)
    assert plan.scoring is not None
    assert len(plan.scoring.labels) == 3
    with pytest.raises(InvalidRequest):
        job(plan)


@evidence
def eos_id(folder: Path) -> None:
    third = fake_token([1] * 10, 0, 0, 2)
    run = steps(start(folder, eos_id=[third]), submit(1))
    run.drain()
    assert [list(told.finishes) for told in run.told if FINISH_STOP in told.finishes] == [[FINISH_STOP]]
    assert sum(len(told.tokens) for told in run.told) == 3
    assert start(folder).eos_id == [2]


# --- capacity ---------------------------------------------------------------------------------------------------------


@evidence
def max_total_token_num(folder: Path) -> None:
    small, large = start(folder), start(folder, max_total_token_num=2000)
    assert 1.9 < large.budget.row("kv cache") / small.budget.row("kv cache") < 2.1
    for plan, together in ((small, 1), (large, 2)):
        assert len(steps(plan, submit(1, 300, 250), submit(2, 300, 250)).drain()[0].rows) == together


@evidence
def batch_max_tokens(folder: Path) -> None:
    for most, together in ((600, 1), (800, 2)):
        plan = start(folder, batch_max_tokens=most)
        assert len(steps(plan, submit(1, 400), submit(2, 400)).drain()[0].rows) == together


@evidence
def running_max_req_size(folder: Path) -> None:
    for most in (2, 3):
        plan = start(folder, running_max_req_size=most, batch_max_tokens=600)
        assert max(step.size for step in steps(plan, *map(submit, range(1, 6))).drain()) == most


@evidence
def max_req_input_len(folder: Path) -> None:
    plan = start(folder, max_req_input_len=4)
    assert job(plan, "abcd").prompt_ids == [*b"abcd"]
    with pytest.raises(InvalidRequest, match="max_req_input_len"):
        job(plan, "abcde")


@evidence
def max_req_total_len(folder: Path) -> None:
    plan = start(folder, max_req_total_len=12, max_req_input_len=11)
    assert job(plan, "abcd").params.max_new_tokens == 8
    with pytest.raises(InvalidRequest, match="max_req_total_len"):
        job(plan, "abcde")


@evidence
def long_truncation_mode(folder: Path) -> None:
    for mode, kept in (("head", b"efgh"), ("center", b"abgh")):
        assert job(start(folder, max_req_input_len=4, long_truncation_mode=mode), "abcdefgh").prompt_ids == [*kept]
    with pytest.raises(InvalidRequest):
        job(start(folder, max_req_input_len=4, long_truncation_mode="None"), "abcdefgh")


# --- scheduling -------------------------------------------------------------------------------------------------------


def admitted_at_once(folder: Path, **written: Any) -> int:
    """Of two that ask for more new tokens than there are slots for both."""
    plan = start(folder, batch_max_tokens=600, **written)
    return len(steps(plan, submit(1, 10, 550), submit(2, 10, 550)).turn().rows)  # type: ignore[union-attr]


@evidence
def router_token_ratio(folder: Path) -> None:
    guess = {"router_max_new_token_len": 20}
    assert [admitted_at_once(folder, router_token_ratio=ratio, **guess) for ratio in (0.0, 0.9)] == [1, 2]


@evidence
def router_max_new_token_len(folder: Path) -> None:
    guesses = [admitted_at_once(folder, router_token_ratio=0.9, router_max_new_token_len=most) for most in (20, 550)]
    assert guesses == [2, 1]


@evidence
def router_max_wait_tokens(folder: Path) -> None:
    for rounds in (2, 7):
        run = steps(start(folder, batch_max_tokens=600, router_max_wait_tokens=rounds), submit(1, most=100))
        run.turn()
        run.put(submit(2))
        waited = 0
        while not (run.turn() or run.launched[-1]).rows:
            waited += 1
        assert waited == rounds


@evidence
def use_dynamic_prompt_cache(folder: Path) -> None:
    for on, computed in ((True, 1), (False, 50)):
        run = steps(start(folder, use_dynamic_prompt_cache=on), submit(1, prompt=[7] * 50))
        run.drain()
        run.put(submit(2, prompt=[7] * 50))
        assert len(run.drain()[0].rows[0].tokens) == computed


def longest_block(folder: Path, **written: Any) -> int:
    """Prompt tokens in a step beside a running request."""
    run = steps(start(folder, **written), submit(1, most=100))
    run.turn()
    run.put(submit(2, length=200))
    return max(len(row.tokens) for step in run.drain() for row in step.rows)


@evidence
def splitfuse_mode(folder: Path) -> None:
    assert longest_block(folder, splitfuse_mode=True) <= 256
    blocks = [longest_block(folder, splitfuse_mode=on, splitfuse_block_size=32) for on in (True, False)]
    assert blocks[0] <= 32 < blocks[1] == 200


@evidence
def splitfuse_block_size(folder: Path) -> None:
    blocks = [longest_block(folder, splitfuse_mode=True, splitfuse_block_size=size) for size in (32, 128)]
    assert blocks[0] <= 32 < blocks[1] <= 128


@evidence
def mode(folder: Path) -> None:
    dense, quantised = (start(folder, mode=names) for names in ([], ["triton_w8a16"]))
    matrices = [weight for weight in architecture_of(quantised).weights if weight.quantisable]
    assert {quantised.schemes.of(weight).name for weight in matrices} == {"w8a16"}
    assert {dense.schemes.of(weight).name for weight in matrices} == {"dense"}
    assert quantised.budget.row("weights") < dense.budget.row("weights")


# --- modes of generation ----------------------------------------------------------------------------------------------


def prompts_computed(plan: Plan) -> int:
    """Of a request for two sequences."""
    return sum(len(row.tokens) > 1 for step in steps(plan, submit(1, params={"n": 2})).drain() for row in step.rows)


@evidence
def diverse_mode(folder: Path) -> None:
    assert [prompts_computed(start(folder, diverse_mode=on)) for on in (True, False)] == [1, 2]


@evidence
def beam_mode(folder: Path) -> None:
    plan = start(folder, beam_mode=True)
    assert prompts_computed(plan) == 1
    assert job(plan, n=2, length_penalty=2.0).params.length_penalty == 2.0
    with pytest.raises(InvalidRequest, match="beam_mode is off"):
        job(start(folder), n=2, length_penalty=2.0)


@evidence
def token_healing_mode(folder: Path) -> None:
    for on, taken_back in ((True, b"ld"), (False, b"")):
        made = job(start(folder, token_healing_mode=on))
        assert (bytes(made.prompt_ids) + taken_back, made.params.healing) == (b"hello world", taken_back)


@evidence
def return_all_prompt_logprobs(folder: Path) -> None:
    told = [job(start(folder, return_all_prompt_logprobs=on)).params.prompt_logprobs for on in (True, False)]
    assert told == [0, -1]


# --- images -----------------------------------------------------------------------------------------------------------


def seeing(folder: Path, **written: Any) -> Plan:
    """Of the fake engine."""
    file = folder / "lightllmd.toml"
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in written.items())
    file.write_text(f'{text}[engine]\nbackend = "fake"\ndevice = "cpu"\n')
    config = load(str(file))
    return resolve(config, probe(msgspec.convert(request(config, {}), Request)))


@evidence
def enable_multimodal(folder: Path) -> None:
    assert "model of text" in refused_as("enable_multimodal", folder, enable_multimodal=True)
    assert [start(folder, enable_multimodal=on).vision for on in (False, "auto")] == [None, None]
    assert [seeing(folder, enable_multimodal=on).vision is not None for on in (False, True, "auto")] == [0, 1, 1]


@evidence
def cache_capacity(folder: Path) -> None:
    few, many = (seeing(folder, enable_multimodal=True, cache_capacity=most).vision for most in (10, 30))
    assert few is not None
    assert many is not None
    assert 3 * few.kept_bytes == many.kept_bytes > 0


@evidence
def cache_reserved_ratio(folder: Path) -> None:
    kept = [
        reserved(10, start(folder, cache_reserved_ratio=ratio).config.params.cache_reserved_ratio)
        for ratio in (0.0, 0.25, 1.0)
    ]
    assert kept == [0, 2, 9]


# --- statistics -------------------------------------------------------------------------------------------------------


def line_due(plan: Plan, seconds: float) -> bool:
    """Whether an engine that has run for so long tells its throughput."""
    configure = messages.EngineConfigure(encode_plan(plan), 1, 0, "ipc://unused", "", "engine-0")
    statistics = EngineWorker(None, None, configure, plan)._statistics  # type: ignore[arg-type]
    statistics.count(1, 1, 0.0)
    return statistics.count(1, 1, seconds)


@evidence
def disable_log_stats(folder: Path) -> None:
    assert [line_due(start(folder, disable_log_stats=off), 1e6) for off in (True, False)] == [False, True]


@evidence
def log_stats_interval(folder: Path) -> None:
    assert [line_due(start(folder, log_stats_interval=3.5), at) for at in (3.4, 3.6)] == [False, True]
    assert [line_due(start(folder, log_stats_interval=0.0), at) for at in (9.9, 10.1)] == [False, True]


class Gateway(HTTPServer):
    """Keeps what is pushed to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Taken)
        self.pushed: list[tuple[str, str | None, bytes]] = []  # path, authorization, body


class _Taken(BaseHTTPRequestHandler):
    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.pushed.append((self.path, self.headers["Authorization"], body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def pushed(folder: Path, **written: Any) -> tuple[str, str | None, bytes]:
    with Gateway() as gateway:
        thread = threading.Thread(target=gateway.handle_request)
        thread.start()
        address = f"127.0.0.1:{gateway.server_port}"
        config = configured(folder, dict(os.environ), metric_gateway=address, **written)
        target = pusher._target(SimpleNamespace(config=config))  # type: ignore[arg-type]
        assert target is not None
        registry = CollectorRegistry()
        Gauge("tokens", "of a test", registry=registry).set(5)
        faults: list[str] = []
        Attempt(target, registry, 10.0, faults.append).run()
        thread.join()
        assert faults == [""]
        return gateway.pushed[0]


@evidence
def metric_gateway(folder: Path) -> None:
    path, _, body = pushed(folder)
    assert path == "/metrics/job/lightllm"
    assert b"tokens 5.0" in body


@evidence
def job_name(folder: Path) -> None:
    assert pushed(folder, job_name="mine")[0] == "/metrics/job/mine"


@evidence
def grouping_key(folder: Path) -> None:
    assert pushed(folder, grouping_key=["instance=node7"])[0] == "/metrics/job/lightllm/instance/node7"


@evidence
def push_interval(folder: Path) -> None:
    config = configured(folder, metric_gateway="gateway:9091", push_interval=3)
    target = pusher._target(SimpleNamespace(config=config))  # type: ignore[arg-type]
    assert target is not None
    assert PushPace(target.interval).wait(0.5) == 3


@evidence
def enable_monitor_auth(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("USERNAME", "me")
        environment.setenv("PASSWORD", "secret")
        told = pushed(folder, enable_monitor_auth=True)[1]
        assert told == f"Basic {b64encode(b'me:secret').decode()}"
        assert pushed(folder)[1] is None


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "model", vocab_size=257)
    return tmp_path


def test_forty_of_forty_work() -> None:
    assert sorted([*EVIDENCE, "quantise"]) == sorted(Params.__struct_fields__)
    assert len(EVIDENCE) == 40


@pytest.mark.parametrize("parameter", EVIDENCE)
def test_it_does_what_the_page_says(parameter: str, folder: Path) -> None:
    EVIDENCE[parameter](folder)
