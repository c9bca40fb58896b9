"""Models that no family covers have transformers' own logits and streams, whatever their requests go through."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightllmd import LLM
from lightllmd.config.plan import Plan
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.scheduling.admission import SchedulerLimits
from lightllmd.engine.scheduling.restriction import Restrictions
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.errors import ConfigInvalid, WeightsInvalid
from lightllmd.ipc.messages import SamplingParams, Submit
from lightllmd.models.hf.dry_run import outlined
from tiny_causal_lms import CONFIGS, GROUPED, write_causal_lm
from tiny_models import DEVICE, Driver, plan_for, transformers_model

TOLERANCE = 1e-4
PROMPT, NEW = 21, 7  # tokens


def plan_of(folder: Path, **options: Any) -> Plan:
    """As the probe and resolution make it, without their processes."""
    plan = plan_for(folder, **{"max_req_input_len": 63, "max_req_total_len": 64, **options})
    assert plan.model is not None
    found = outlined(str(folder), trust=False)
    assert found.outline is not None, found.refused
    model = msgspec.structs.replace(plan.model, outline=found.outline)
    return msgspec.structs.replace(plan, model=model)


def load(plan: Plan) -> CpuRunner:
    runner = CpuRunner()
    runner.load(plan, lambda done, total: None)
    return runner


class Case:
    """One model: the plan and transformers' logits of a sequence."""

    def __init__(self, folder: Path) -> None:
        self.plan = plan_of(folder)
        self.runner = load(self.plan)
        self.model = transformers_model(folder)
        self.ids = random.Random(1).choices(range(3, 96), k=PROMPT + NEW)

    @torch.inference_mode()
    def truth(self, ids: list[int]) -> Tensor:
        """``[T, vocab]``."""
        logits: Tensor = self.model(torch.tensor([ids])).logits[0]
        return logits

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.truth(ids)[-1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(write_causal_lm(tmp_path_factory.mktemp("causal"), request.param))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert torch.isfinite(ours).all()
    difference = (ours - theirs).abs().max().item()
    assert difference < TOLERANCE, difference


def test_logits_are_those_of_transformers_in_any_batch_and_behind_a_cached_prefix(case: Case) -> None:
    driver = Driver(case.runner, scattered=True, poisoned=True)
    truth = case.truth(case.ids)
    others = [driver.row(7, case.ids[3:9]), driver.row(8, case.ids[5:6])]
    first = driver.logits(*others, driver.row(0, case.ids[:13], sample=False, prompt_length=PROMPT))[2]
    close(first, truth[:13])
    rest = driver.logits(driver.row(7, [4], 1), driver.row(0, case.ids[13:PROMPT]), driver.row(8, [9], 1))[1]
    close(rest, truth[13:PROMPT])
    for index, token in enumerate(case.ids[PROMPT:]):
        close(
            driver.logits(driver.row(0, [token], index + 1), driver.row(7, [5], 2 + index))[0],
            truth[PROMPT + index][None],
        )


class Engine:
    """Scheduler and runner of one generation."""

    def __init__(self, case: Case, number: int, runner: CpuRunner) -> None:
        plan = case.plan
        self.scheduler = Scheduler(SchedulerLimits.of(plan), number, Restrictions(plan.vocab_size, [], None))
        self.loop = StepLoop(self.scheduler, runner, lambda step: None)
        self.told: dict[int, list[int]] = {}

    def submit(self, number: int, prompt: list[int], emitted: list[int]) -> None:
        params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
        self.told[number] = []
        message = Submit(number, 0, 1, number, prompt, params, branches=[0], emitted=[emitted])
        assert self.scheduler.submit(message) is None

    def turn(self) -> None:
        for output in self.loop.turn(lambda: None).values():
            for request, token in zip(output.requests, output.tokens, strict=True):
                self.told[request].append(token)


def test_greedy_streams_are_theirs_through_a_kill_and_replay(case: Case) -> None:
    prompts = {1: case.ids[:PROMPT], 2: case.ids[4:11]}
    engine = Engine(case, 1, case.runner)
    for number, prompt in prompts.items():
        engine.submit(number, prompt, [])
    while min(map(len, engine.told.values())) < 3:
        engine.turn()
    emitted = engine.told
    engine = Engine(case, 2, load(case.plan))
    for number, prompt in prompts.items():
        engine.submit(number, prompt, emitted[number])
    while engine.loop.busy:
        engine.turn()
    for number, prompt in prompts.items():
        assert emitted[number] + engine.told[number] == case.greedy(prompt, NEW)


# --- features -----------------------------------------------------------------------------------------------------

QUIET = {"device": "cpu", "threads": 1, "progress": False}
LIMITS = {"max_req_input_len": 63, "max_req_total_len": 64, "max_total_token_num": 320, "running_max_req_size": 6}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny mixtral. It is looked at in this process, which has the imports done."""

    def here(task: str, directory: str, *, trust: bool, weights: bool, doing: str) -> Any:
        return msgspec.to_builtins(outlined(directory, trust, weights=weights))

    monkeypatch.setattr("lightllmd.probe.model.ask", here)
    return write_causal_lm(tmp_path / "mixtral", "mixtral")


@torch.inference_mode()
def log_probabilities(model: Any, prompt: list[int], told: list[int]) -> list[float]:
    """Of the tokens that were told, one after the other."""
    ids = torch.tensor([prompt + told])
    truth = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return truth[len(prompt) - 1 :].tolist()


def test_cache_blocks_branches_and_prompt_log_probabilities_are_as_for_a_family(served: Path) -> None:
    draw = random.Random(3)
    prefix = draw.choices(range(3, 96), k=20)
    prompts = [prefix + draw.choices(range(3, 96), k=4) for _ in range(2)]
    model = transformers_model(served)
    asked = {"max_new_tokens": 8, "ignore_eos": True}
    blocks = {"use_dynamic_prompt_cache": True, "splitfuse_mode": True, "splitfuse_block_size": 8}
    with LLM(str(served), data_type="float32", **blocks, **QUIET, **LIMITS) as llm:
        [first] = llm.generate(prompt_token_ids=prompts[:1], **asked)
        [second] = llm.generate(prompt_token_ids=prompts[1:], do_sample=True, seed=5, n=3, **asked)
        [scored] = llm.generate(prompt_token_ids=prompts[:1], prompt_logprobs=1, **asked)
    assert (first.cached, second.cached) == (0, len(prefix))
    assert scored.token_ids == first.token_ids
    truth = log_probabilities(model, prompts[0][:1], prompts[0][1:])
    assert scored.prompt_logprobs == pytest.approx(truth, abs=TOLERANCE)
    for prompt, output in zip(prompts, (first, second), strict=True):
        for branch in output.branches:
            truth = log_probabilities(model, prompt, branch.token_ids)
            assert branch.logprobs == pytest.approx(truth, abs=TOLERANCE)
    assert len({tuple(branch.token_ids) for branch in second.branches}) > 1


def test_beams_and_sixteen_bits_work(served: Path) -> None:
    prompt, model = random.Random(4).choices(range(3, 96), k=12), transformers_model(served)
    with LLM(str(served), data_type="float32", beam_mode=True, **QUIET, **LIMITS) as llm:
        [output] = llm.generate(prompt_token_ids=[prompt], n=3, max_new_tokens=6, ignore_eos=True)
    sums = [sum(log_probabilities(model, prompt, branch.token_ids)) for branch in output.branches]
    assert sums == sorted(sums, reverse=True)
    assert [sum(branch.logprobs or []) for branch in output.branches] == pytest.approx(sums, abs=TOLERANCE)
    with LLM(str(served), data_type="bfloat16", **QUIET, **LIMITS) as llm:
        [output] = llm.generate(prompt_token_ids=[prompt], max_new_tokens=6, ignore_eos=True)
    [branch] = output.branches
    truth = log_probabilities(model, prompt, branch.token_ids)
    assert branch.logprobs == pytest.approx(truth, abs=0.3)


def test_random_weights_need_no_file_and_are_the_same_each_time(served: Path) -> None:
    (served / "model.safetensors").unlink()
    told = []
    for _ in range(2):
        with LLM(str(served), load_way="DUMMY", data_type="float32", **QUIET, **LIMITS) as llm:
            [output] = llm.generate(prompt_token_ids=[[5, 6, 7, 8]], max_new_tokens=6, ignore_eos=True)
        told.append((output.token_ids, output.branches[0].logprobs))
    assert told[0] == told[1]


def test_a_length_that_rotary_angles_would_depend_on_is_refused_with_the_one_that_works(served: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    rope |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [4.0, 5.0, 6.0, 7.0]}
    folder = write_causal_lm(served.parent / "phi3", "phi3", rope_parameters=rope, original_max_position_embeddings=32)
    with pytest.raises(ConfigInvalid, match="max_req_total_len = 32 or less works"):
        LLM(str(folder), max_req_total_len=33, max_req_input_len=16, device="cpu")
    prompt, model = [5, 6, 7, 8], transformers_model(folder)
    limits = {**LIMITS, "max_req_input_len": 16, "max_req_total_len": 32}
    with LLM(str(folder), data_type="float32", **QUIET, **limits) as llm:
        [output] = llm.generate(prompt_token_ids=[prompt], max_new_tokens=20, ignore_eos=True)
    truth = log_probabilities(model, prompt, output.token_ids)
    assert output.branches[0].logprobs == pytest.approx(truth, abs=TOLERANCE)


# --- a GPU's kernels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mistral", "deepseek_v2"])
def test_the_kernels_of_a_gpu_give_the_same_logits_before_and_after_a_sleep(kind: str, tmp_path: Path) -> None:
    """Heads of 8 and 12 elements are padded to 16; keys of one of them are longer than its values."""
    pytest.importorskip("triton")
    from lightllmd.engine.runners.gpu import GpuRunner

    runner = GpuRunner()
    runner.load(plan_of(write_causal_lm(tmp_path, kind), slots=255, device=DEVICE), lambda done, total: None)
    assert {heads.dim for heads in runner.decoder.heads} == {16}
    ids = random.Random(1).choices(range(3, 96), k=17)
    with torch.inference_mode():
        truth = transformers_model(tmp_path)(torch.tensor([ids])).logits[0]
    driver = Driver(runner, scattered=True, poisoned=True)
    first = driver.logits(driver.row(3, ids[:5]), driver.row(0, ids[:13]))[1]
    rest = driver.logits(driver.row(0, ids[13:16]))[0]
    last = driver.logits(driver.row(0, ids[16:17], 1), driver.row(3, [7], 1))[0]
    close(torch.cat([first, rest, last]).cpu(), truth)
    runner.stage()
    runner.release(lambda done, total: None)
    runner.restore(lambda done, total: None)
    driver = Driver(runner)
    close(driver.logits(driver.row(0, ids[:13]))[0].cpu(), truth[:13])


# --- what can't be served -----------------------------------------------------------------------------------------


def saved(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A tiny mixtral with other tensors."""
    write_causal_lm(folder, "mixtral")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def renamed(tensors: dict[str, Tensor]) -> str:
    return next(name for name in sorted(tensors) if "experts.2" in name and "layers.1" in name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (lambda tensors: tensors.pop(renamed(tensors)), "layers.1"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(33)}),
            "tensor model.norm.weight has shape [33]",
        ),
    ],
    ids=["a norm is missing", "an expert is missing", "a norm of another size"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_it_is_read(
    change: Callable[[dict[str, Tensor]], object], said: str, tmp_path: Path
) -> None:
    found = outlined(str(saved(tmp_path, change)), trust=False)
    assert found.damaged
    assert said in found.refused


def test_a_file_that_is_cut_off_after_the_plan_is_named(tmp_path: Path) -> None:
    plan = plan_of(write_causal_lm(tmp_path, "mixtral"))
    file = tmp_path / "model.safetensors"
    whole = file.stat().st_size
    runner = CpuRunner()

    def progress(done: int, total: int) -> None:
        os.truncate(file, whole // 2)

    with pytest.raises(WeightsInvalid, match=re.escape(str(file))):
        runner.load(plan, progress)


def test_a_model_whose_attention_ignores_the_interface_is_refused_by_its_class(tmp_path: Path) -> None:
    for kind in ("bloom", "mpt"):
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": kind, "hidden_size": 32, "n_layer": 2, "n_head": 4})
        )
        refused = outlined(str(tmp_path), trust=False, weights=False).refused
        assert refused.startswith(f"{kind.title()}ForCausalLM computes attention by itself"), refused


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt_oss"}, "GptOssForCausalLM: attention with s_aux"),
        ({"model_type": "llama4_text", "layer_types": None}, "Llama4ForCausalLM: attention with a mask of its own"),
        ({"model_type": "bart"}, "BartForCausalLM takes no positions from its caller"),
        ({"model_type": "mamba"}, "MambaForCausalLM computes attention, or a state of another kind, by itself"),
        ({"model_type": "bert"}, "BertLMHeadModel: attention that is neither causal"),
        ({"model_type": "t5"}, "transformers makes no causal language model of it"),
    ],
    ids=lambda one: one["model_type"] if isinstance(one, dict) else "",
)
def test_what_our_attention_has_not_is_refused_by_name(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**GROUPED, **config}))
    refused = outlined(str(tmp_path), trust=False, weights=False).refused
    assert refused.startswith(said), refused
