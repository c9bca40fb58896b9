"""Every Llama variant has the logits of transformers, whatever batch, slots and interruptions it goes through."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_models import VARIANTS, Driver, load, transformers_model, write_model

TOLERANCE = 1e-4
PROMPT, LONGER = 29, 11  # tokens of the prompt and of what is generated behind it


class Case:
    """One variant: our runner, transformers' model, a sequence, and transformers' logits of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runner = load(folder)
        self.model = transformers_model(folder)
        vocab = self.runner.decoder.spec.vocab
        self.ids = random.Random(1).choices(range(vocab), k=PROMPT + LONGER)
        self.ids[0] = vocab - 1  # the last row of an odd vocabulary
        self.truth = self.by_transformers(self.ids[:PROMPT], self.ids[PROMPT:])

    @torch.inference_mode()
    def by_transformers(self, prompt: list[int], emitted: list[int]) -> Tensor:
        """As its generate computes them: the prompt at once, then token by token over its cache."""
        out = self.model(torch.tensor([prompt]), use_cache=True)
        logits = [out.logits[0]]
        for token in emitted:
            out = self.model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[0])
        self.model(torch.tensor([prompt[:2]]))  # a dynamic rope goes back to its original base
        return torch.cat(logits)


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(write_model(tmp_path_factory.mktemp("tiny"), VARIANTS[request.param]))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert torch.isfinite(ours).all()
    difference = (ours - theirs).abs().max().item()
    assert difference < TOLERANCE, difference


def others(driver: Driver, vocab: int, count: int) -> list[Any]:
    """Rows of other requests, some prefilling, for the same step."""
    draw = random.Random(2)
    return [driver.row(5 + number, draw.choices(range(vocab), k=3 + 13 * number)) for number in range(count)]


def test_a_whole_prompt_has_transformers_logits(case: Case) -> None:
    driver = Driver(case.runner, poisoned=True)
    close(driver.logits(driver.row(0, case.ids[:PROMPT]))[0], case.truth[:PROMPT])


def test_a_prompt_beyond_any_trained_length_has_them_too(case: Case) -> None:
    driver = Driver(case.runner)
    close(driver.logits(driver.row(0, case.ids))[0], case.by_transformers(case.ids, []))


def test_decoding_token_by_token_has_them(case: Case) -> None:
    driver = Driver(case.runner, poisoned=True)
    driver.logits(driver.row(0, case.ids[:PROMPT]))
    for index, token in enumerate(case.ids[PROMPT:]):
        close(driver.logits(driver.row(0, [token], index + 1))[0], case.truth[PROMPT + index][None])


def test_a_row_does_not_feel_the_batch_around_it(case: Case) -> None:
    driver = Driver(case.runner, poisoned=True, scattered=True)
    vocab = case.runner.decoder.spec.vocab
    logits = driver.logits(*others(driver, vocab, 2), driver.row(0, case.ids[:PROMPT]))[2]
    close(logits, case.truth[:PROMPT])
    for index, token in enumerate(case.ids[PROMPT:]):
        neighbours = [driver.row(5, [3], index + 1), driver.row(6, [4], index + 1)]
        if index == 3:  # a prompt enters in the middle of decoding
            neighbours.append(driver.row(8, case.ids[:17]))
        rows = [neighbours[0], driver.row(0, [token], index + 1), *neighbours[1:]]
        close(driver.logits(*rows)[1], case.truth[PROMPT + index][None])


def test_a_paused_row_resumes_as_if_nothing_had_happened(case: Case) -> None:
    driver = Driver(case.runner, poisoned=True, scattered=True)
    driver.logits(driver.row(0, case.ids[:PROMPT]))
    for index, token in enumerate(case.ids[PROMPT : PROMPT + 4]):
        driver.logits(driver.row(0, [token], index + 1))
    driver.release(0)
    again = driver.logits(driver.row(0, case.ids[: PROMPT + 5], 5))[0]
    close(again, case.truth[: PROMPT + 5])
    close(driver.logits(driver.row(0, [case.ids[PROMPT + 5]], 6))[0], case.truth[PROMPT + 5][None])


def test_another_generation_replays_to_the_same_logits(case: Case) -> None:
    driver = Driver(load(case.folder), scattered=True, poisoned=True, seed=7)
    replayed = driver.logits(driver.row(3, case.ids[: PROMPT + 6], 6))[0]
    close(replayed, case.truth[: PROMPT + 6])
    for index, token in enumerate(case.ids[PROMPT + 6 :], 6):
        close(driver.logits(driver.row(3, [token], index + 1))[0], case.truth[PROMPT + index][None])


@pytest.mark.parametrize("cut", [1, 16, PROMPT - 1])
def test_a_prefill_behind_a_cached_prefix_has_them(case: Case, cut: int) -> None:
    driver = Driver(case.runner, poisoned=True, scattered=True)
    first = driver.logits(driver.row(0, case.ids[:cut], sample=False, prompt_length=PROMPT))[0]
    rest = driver.logits(*others(driver, case.runner.decoder.spec.vocab, 1), driver.row(0, case.ids[cut:PROMPT]))[1]
    close(torch.cat([first, rest]), case.truth[:PROMPT])


def test_a_run_of_slots_and_scattered_ones_agree(case: Case) -> None:
    of_run, scattered = (Driver(case.runner, poisoned=True, scattered=flag) for flag in (False, True))
    ids = case.ids[:PROMPT]
    runs = [of_run.logits(of_run.row(0, ids))[0], of_run.logits(of_run.row(0, [5], 1))[0]]
    of_run.release(0)
    others_slots = [scattered.logits(scattered.row(0, ids))[0], scattered.logits(scattered.row(0, [5], 1))[0]]
    close(torch.cat(runs), torch.cat(others_slots))
