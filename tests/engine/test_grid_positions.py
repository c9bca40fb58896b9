"""Rotary positions in the grids of images: as transformers has them, and a text model that is fed them has the logits
of transformers' own, whatever batch, blocks and interruptions its rows go through."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from covering import ALL
from lightllmd.architecture.families import architecture_of
from lightllmd.engine.images.prompt_images import PromptImages, positions_in_grids
from lightllmd.engine.step import DecodeRows, Row, Step
from lightllmd.errors import ConfigInvalid
from lightllmd.ipc.messages import ImageSpan
from tiny_models import UNLIKE_LLAMA, Driver, load, load_on_device, write_model

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
KINDS = {
    "qwen2_vl_text": {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "rope_theta": 10000.0},
    "qwen2_5_vl_text": {"rope_parameters": ROPE, "rope_theta": None},
    "qwen3_vl_text": {"rope_parameters": ROPE, "rope_theta": None, "head_dim": 16},
}


SPANS = [ImageSpan(3, 6, b"a", (1, 2, 3)), ImageSpan(9, 4, b"b", (1, 4, 1)), ImageSpan(15, 1, b"c", (1, 1, 1))]
PROMPT, LONGER = 24, 4


def table(positions: bytes | None, count: int, plain: int) -> np.ndarray:
    """[3, count]."""
    if positions is None:
        return np.broadcast_to(np.arange(plain, plain + count), (3, count))
    return np.frombuffer(positions, "<i4").reshape(3, count)


def placed_in(spans: list[ImageSpan], length: int) -> PromptImages:
    """Of a prompt of so many tokens."""
    return PromptImages(spans, [], positions=positions_in_grids(spans, length))


def drawn_spans(draw: random.Random) -> tuple[list[ImageSpan], int]:
    """Some images, a few of them right behind each other or at the prompt's beginning, and how long it is."""
    spans, end = [], draw.choice([0, 0, 4])
    for _ in range(draw.randrange(1, 5)):
        grid = (1, draw.randrange(1, 7), draw.randrange(1, 7))
        spans.append(ImageSpan(end, grid[1] * grid[2], b"", grid))
        end += spans[-1].tokens + draw.choice([1, 2, 9])
    return spans, end


@pytest.mark.parametrize("seed", range(12))
def test_positions_of_any_part_of_a_prompt_are_those_of_transformers(seed: int) -> None:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    draw = random.Random(seed)
    spans, length = drawn_spans(draw)
    kinds = torch.zeros(1, length, dtype=torch.int64)
    for span in spans:
        kinds[0, span.start : span.start + span.tokens] = 1
    model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2)))
    model.get_vision_position_ids = lambda *words, **named: Qwen3VLModel.get_vision_position_ids(model, *words, **named)
    grids = torch.tensor([(1, 2 * span.grid[1], 2 * span.grid[2]) for span in spans])
    truth, shift = Qwen3VLModel.get_rope_index(model, torch.zeros_like(kinds), kinds, image_grid_thw=grids)
    ours = placed_in(spans, length)
    assert ours.shift == int(shift)
    longer = np.concatenate([truth[:, 0].numpy(), table(None, 5, length + ours.shift)], 1)
    for _ in range(20):
        start = draw.randrange(length + 4)
        end = draw.randrange(start + 1, length + 6)
        positions = ours.positions(start, end)
        assert (table(positions, end - start, start + ours.shift) == longer[:, start:end]).all()


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ({"mrope_section": [2, 3]}, "mrope_section is .*three numbers"),
        ({"mrope_section": [2, 3, 4]}, "mrope_section .* is not made for head_dim 16: it has 8 frequencies"),
        ({"mrope_section": "x"}, "mrope_section is"),
        ({"rope_type": "yarn", "factor": 2.0}, "rope type .*yarn.* is not available yet"),
        (
            {"rope_type": "dynamic", "factor": 2.0},
            "rope type 'dynamic' is not available yet for positions in the grids",
        ),
    ],
)
def test_what_positions_cannot_be_is_refused_by_name(words: dict[str, Any], refused: str) -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8}
    with pytest.raises(ConfigInvalid, match=refused):
        architecture_of("qwen2_vl_text", {**config, "vocab_size": 9, "rope_parameters": {**ROPE, **words}})


class Case:
    """One kind of text model and transformers' logits of a prompt with images and what is behind it."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = write_model(folder, {"architectures": ["TextForCausalLM"], "model_type": kind, **KINDS[kind]})
        self.kind = kind
        self.ids = random.Random(1).choices(range(128), k=PROMPT + LONGER)
        self.grid = placed_in(SPANS, PROMPT)
        self.truth = self._by_transformers()

    @torch.inference_mode()
    def _by_transformers(self) -> Tensor:
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoModel

        config = json.loads((self.folder / "config.json").read_text())
        model = AutoModel.from_config(AutoConfig.for_model(**config), attn_implementation="eager").eval()
        tensors = load_file(self.folder / "model.safetensors")
        head = tensors.pop("lm_head.weight")
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
        ends = len(self.ids)
        positions = torch.from_numpy(table(self.grid.positions(0, ends), ends, 0).astype(np.int64))
        hidden = model(input_ids=torch.tensor([self.ids]), position_ids=positions[:, None]).last_hidden_state
        return hidden[0] @ head.T

    def placed(self, row: Row) -> Row:
        """As a row of the prompt."""
        row.positions, row.shift = self.grid.positions(row.start, row.start + len(row.tokens)), self.grid.shift
        return row


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    assert set(KINDS) <= set(UNLIKE_LLAMA)
    return Case(tmp_path_factory.mktemp("grid"), request.param)


def check(case: Case, driver: Driver, tolerance: float = 1e-4) -> None:
    """A prompt in blocks beside text rows, token by token behind it, replayed."""
    text = list(range(5, 18))
    alone = driver.logits(driver.row(5, text))[0]
    driver.release(5)
    found = []
    for begin, end in ((0, 5), (5, 6), (6, 17), (17, PROMPT)):
        rows = [driver.row(1, case.ids[begin:end], prompt_length=PROMPT), driver.row(3, text[begin:end] or [9])]
        logits = driver.logits(rows[1], case.placed(rows[0]))
        found.append(logits[1])
        if not begin:
            assert (logits[0] - alone[:5]).abs().max() < tolerance
    for index in range(LONGER):
        row, other = driver.row(1, [case.ids[PROMPT + index]], index + 1), driver.row(3, [8], 2)
        found.append(driver.logits(other, case.placed(row))[1])
    assert (torch.cat(found).cpu() - case.truth).abs().max() < tolerance
    again = driver.logits(case.placed(driver.row(2, case.ids, LONGER)), driver.row(4, text))
    assert (again[0].cpu() - case.truth).abs().max() < tolerance
    assert (again[1] - alone).abs().max() < tolerance


def test_logits_are_those_of_transformers_in_blocks_beside_text_decoded_and_replayed(case: Case) -> None:
    driver = Driver(load(case.folder), scattered=True, poisoned=True)
    check(case, driver)


def greedy(case: Case, runner: Any, overlapped: bool) -> list[int]:
    """Rows that go on with their own newest tokens: one behind images, a sibling of it, one of text."""
    driver = Driver(runner, scattered=True)
    rows = [case.placed(driver.row(0, case.ids[:PROMPT])), driver.row(2, case.ids[:7])]
    steps = [driver.step(*rows)]
    for place in range(1, 4):
        rows = [driver.row(number, [0], place) for number in (0, 2)]
        lists = zip(*((row.table_row, row.start, row.slots[0], row.position) for row in rows), strict=True)
        steps.append(Step(place + 1, "decode", DecodeRows(*map(list, lists)), [], []))
    tokens = []
    for number, step in enumerate(steps):
        runner.launch(step, lambda: None)
        if not overlapped or number:
            tokens += runner.collect(lambda: None).tokens
    return tokens if not overlapped else tokens + runner.collect(lambda: None).tokens


def test_decode_rows_go_on_at_the_shift_of_their_prompt(case: Case) -> None:
    runner = load(case.folder)
    tokens = greedy(case, runner, False)
    ids = [*case.ids[:PROMPT], *tokens[::2]]
    driver = Driver(runner)
    logits = driver.logits(case.placed(driver.row(0, ids[:-1])))[0]
    assert logits[PROMPT - 1 :].argmax(-1).tolist() == tokens[::2]
    assert case.truth[PROMPT - 1].argmax() == tokens[0]


def test_a_gpu_has_the_same_logits_and_tokens(case: Case) -> None:
    pytest.importorskip("triton")
    if case.kind != "qwen3_vl_text" and not torch.cuda.is_available():
        pytest.skip("in the interpreter one kind is enough: a packer knows none of them")
    runner = load_on_device(case.folder)
    if ALL:  # in the interpreter test_qwen_vl has the same of a whole model
        check(case, Driver(runner, scattered=True, poisoned=True), 2e-4)
    assert greedy(case, runner, True) == greedy(case, load(case.folder), False)
