"""Images of a model that is cut over two ranks: the message of a step carries their embeddings to the other one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import msgspec

from image_prompts import Served, draw_prompts, streams
from lightllmd.engine.backends import runner_for
from lightllmd.ipc.messages import SamplingParams
from rank_threads import ThreadRanks
from tiny_models import VARIANTS, load, plan_for, write_model


def test_two_ranks_see_what_one_does(tmp_path: Path) -> None:
    model = write_model(tmp_path, VARIANTS["plain"])
    modes = {"use_dynamic_prompt_cache": True, "splitfuse_mode": True, "splitfuse_block_size": 7}
    plan = plan_for(model, slots=400, max_req_input_len=120, max_req_total_len=160, running_max_req_size=8, **modes)
    alone = load(model, slots=400)
    table = alone.decoder.embedding.weight.clone()
    prompts, params = draw_prompts(4), SamplingParams(max_new_tokens=5, ignore_eos=True)
    one = Served(plan, alone)
    for prompt in prompts * 2:
        one.submit(prompt, params)
    truth = streams(one.drain())
    ranks = ThreadRanks(msgspec.structs.replace(plan, ranks=2))
    try:
        runner = ranks.lead(partial(runner_for, plan))
        runner.load(ranks._plan, lambda done, total: None)
        runner.prepare(lambda: None)
        two = Served(plan, runner)
        for prompt in prompts * 2:
            two.submit(prompt, params, table)
        found = streams(two.drain())
        runner.close()
    finally:
        ranks.close()
    ranks.check()
    assert {branch: [token for token, _ in stream] for branch, stream in found.items()} == {
        branch: [token for token, _ in stream] for branch, stream in truth.items()
    }
