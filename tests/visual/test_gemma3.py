"""Gemma 3 with images beside transformers: pixels, image embeddings, logits of spans whose tokens see each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from image_prompts import Prompt, Served, hidden, streams
from lightllmd.architecture.schemes import scheme_of
from lightllmd.architecture.vision import vision_of
from lightllmd.architecture.weight_schemes import WeightSchemes
from lightllmd.config.plan import Plan
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.runners.gpu import GpuRunner
from lightllmd.errors import ConfigInvalid
from lightllmd.ipc.messages import SamplingParams, StepOutput
from lightllmd.models.vision.layers import normalised
from rank_models import load_rank, ranks
from tiny_models import DEVICE, Driver, plan_for
from vision_models import SIZES, VisionModel, logits, picture, prompt_ids, write_vision_model

IMAGE, BEGIN, END = 119, 117, 118
TOKENS, WINDOW = 16, 6  # an image is longer than the window
TEXT = {
    "model_type": "gemma3_text",
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    "query_pre_attn_scalar": 20,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 7,
    "vision_use_head": False,
}
SETTINGS = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 56, "width": 56}}


def theirs_config() -> Gemma3Config:
    return Gemma3Config(
        text_config=TEXT,
        vision_config=SIGLIP,
        mm_tokens_per_image=TOKENS,
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )


def theirs() -> Gemma3ForConditionalGeneration:
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(theirs_config()).eval()


@pytest.mark.parametrize("native", [False, True])
@torch.inference_mode()
def test_pixels_embeddings_and_logits_are_those_of_transformers(tmp_path: Path, native: bool) -> None:
    model = theirs()
    write_vision_model(tmp_path, model, SETTINGS, native=native)
    ours = VisionModel.of(tmp_path)
    images = [picture(*size) for size in SIZES]
    words = {key: value for key, value in SETTINGS.items() if key != "image_processor_type"}
    pixels = Gemma3ImageProcessorPil(**words)(images, return_tensors="pt")["pixel_values"]
    for one, truth in zip(ours.prepared(images), pixels, strict=True):
        made = normalised(torch.from_numpy(one.pixels), ours.encoder.spec.norm, torch.float32)
        torch.testing.assert_close(made[0].permute(2, 0, 1), truth.float(), atol=1e-5, rtol=0)
    truth = model.get_image_features(pixel_values=pixels).pooler_output
    embeddings = ours.embeddings(images)
    for made, one in zip(embeddings, truth, strict=True):
        torch.testing.assert_close(made[0], one, atol=1e-4, rtol=1e-4)
    ids, begins = prompt_ids(ours, images)
    given = torch.tensor([ids])
    expected = model(input_ids=given, pixel_values=pixels, token_type_ids=(given == IMAGE).long()).logits[0]
    made = logits(ours.driver(), ids, begins, embeddings, bidirectional=True)
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


NEW = 5
WAYS: dict[str, dict[str, Any]] = {
    "together": {},
    "in blocks": {"splitfuse_mode": True, "splitfuse_block_size": 7},
    "cached": {"use_dynamic_prompt_cache": True, "rounds": 2},
    "cached, in blocks": {
        "use_dynamic_prompt_cache": True,
        "rounds": 2,
        "splitfuse_mode": True,
        "splitfuse_block_size": 7,
    },
}


class Generating:
    """The model of transformers and ours, with three images between texts; prompts with and without some."""

    def __init__(self, folder: Path) -> None:
        self.truth = theirs()
        write_vision_model(folder, self.truth, SETTINGS)
        self.ours, self.folder = VisionModel.of(folder), folder
        images = [picture(*size) for size in SIZES[:3]]
        self._pixels = [one.pixels for one in self.ours.prepared(images)]
        self.table = torch.cat([one[0] for one in self.ours.embeddings(images)])
        image = [tuple(range(TOKENS * at, TOKENS * (at + 1))) for at in range(3)]
        around = [[5, 6, BEGIN], [END, 7, BEGIN], [END, 8, 9, 10]]
        self.prompts: list[Prompt] = [
            [*around[0], image[0], *around[1], image[1], *around[2]],
            [11, 12, 13],
            [*around[0], image[2], *around[2]],
            [*around[0], image[0], END],
        ]

    def plan(self, **params: Any) -> Plan:
        limits = {"max_req_input_len": 100, "max_req_total_len": 120, "running_max_req_size": 8}
        plan = plan_for(self.folder, slots=400, **limits, batch_max_tokens=200, **params)
        return msgspec.structs.replace(plan, model=self.ours.facts)

    @torch.inference_mode()
    def check(self, prompt: Prompt, stream: list[tuple[int, float]], before: list[int]) -> None:
        """That transformers generates this stream, behind some tokens that were emitted `before`."""
        numbers = [part[0] // TOKENS for part in prompt if isinstance(part, tuple)]
        tokens = [token for token, _ in stream]
        text = [one for part in prompt for one in ([IMAGE] * TOKENS if isinstance(part, tuple) else [part])]
        ids = torch.tensor([[*text, *before, *tokens]])
        given: dict[str, Any] = {}
        if numbers:
            norm = self.ours.encoder.spec.norm
            pixels = torch.cat([torch.from_numpy(self._pixels[number]) for number in numbers])
            given["pixel_values"] = normalised(pixels, norm, torch.float32).permute(0, 3, 1, 2)
        logits = self.truth(input_ids=ids, token_type_ids=(ids == IMAGE).long(), **given).logits[0].log_softmax(-1)
        expected = logits[-len(tokens) - 1 : -1]
        assert tokens == expected.argmax(-1).tolist()
        assert [logprob for _, logprob in stream] == pytest.approx(expected.max(-1).values.tolist(), abs=1e-4)


@pytest.fixture(scope="module")
def generating(tmp_path_factory: pytest.TempPathFactory) -> Generating:
    return Generating(tmp_path_factory.mktemp("gemma3"))


@pytest.mark.parametrize("way", WAYS)
def test_streams_are_those_of_transformers(generating: Generating, way: str) -> None:
    rounds, params = WAYS[way].get("rounds", 1), {key: value for key, value in WAYS[way].items() if key != "rounds"}
    runner, plan = CpuRunner(), generating.plan(**params)
    runner.load(plan, lambda done, total: None)
    engine = Served(plan, runner, whole=True)
    told: list[StepOutput] = []
    for _ in range(rounds):
        for prompt in generating.prompts:
            engine.submit(prompt, SamplingParams(max_new_tokens=NEW, ignore_eos=True), generating.table)
        told += engine.drain()
    found = streams(told)
    assert len(found) == rounds * len(generating.prompts)
    for (request, _), stream in found.items():
        generating.check(generating.prompts[(request - 1) % len(generating.prompts)], stream, [])
    if rounds > 1:
        assert sum(count for output in told for _, count in output.cached) > TOKENS


def test_a_replayed_request_goes_on_as_transformers_does(generating: Generating) -> None:
    runner, plan = CpuRunner(), generating.plan()
    runner.load(plan, lambda done, total: None)
    engine = Served(plan, runner, whole=True)
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    engine.submit(generating.prompts[0], params, generating.table)
    (stream,) = streams(engine.drain()).values()
    emitted = [token for token, _ in stream[:2]]
    engine.submit(generating.prompts[0], params, generating.table, emitted=[emitted])
    (rest,) = streams(engine.drain()).values()
    assert len(rest) == NEW - 2
    generating.check(generating.prompts[0], rest, emitted)


def test_a_gpu_runner_computes_the_same(generating: Generating) -> None:
    """In padded and other steps, beside text, behind cached tokens, and where few tokens are asked for."""
    drivers = []
    for runner, device in ((CpuRunner(), "cpu"), (GpuRunner(), DEVICE)):
        runner.load(generating.plan(device=device), lambda done, total: None)
        drivers.append(Driver(runner))
    ids, images = hidden(generating.prompts[0], generating.table, whole=True)
    first = images.spans[0].start + TOKENS

    def steps(driver: Driver) -> list[torch.Tensor]:
        made = []
        for begin, end in ((0, first), (first, len(ids))):
            row, text = driver.row(1, ids[begin:end]), driver.row(2, [9, 8, 7])
            row.images = images.parts(begin, end)
            row.bidirectional = [(part.first, part.rows) for part in row.images or ()]
            made += driver.logits(row, text)
        last = driver.row(3, ids)
        last.images = images.parts(0, len(ids))
        last.bidirectional = [(part.first, part.rows) for part in last.images or ()]
        result = driver.runner.run(driver.step(last), lambda: None)
        return [*made, torch.tensor(result.logprobs)]

    ours, truth = steps(drivers[1]), steps(drivers[0])
    for one, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("entries", "settings", "words"),
    [
        ({}, {"do_pan_and_scan": True}, "do_pan_and_scan"),
        ({"mm_tokens_per_image": 15}, {}, "mm_tokens_per_image is 15, 8 x 8 patches do not make so many"),
        ({"boi_token_index": -1}, {}, "boi_token_index is -1"),
        ({"vision_config": {**SIGLIP, "model_type": "clip_vision_model"}}, {}, "only SigLIP's towers"),
        ({}, {"size": {"height": 64, "width": 64}}, "64x64"),
    ],
)
def test_what_is_not_built_is_refused_by_name(entries: dict[str, Any], settings: dict[str, Any], words: str) -> None:
    config = {**theirs_config().to_dict(), **entries}
    with pytest.raises(ConfigInvalid, match=words):
        vision_of(config, {**SETTINGS, **settings})


def test_a_config_of_the_hub_has_256_tokens_for_each_image() -> None:
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    }
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}
    spec = vision_of({"model_type": "gemma3", "vision_config": tower, "text_config": text})
    assert spec is not None
    assert spec.geometry.layout(3000, 20).tokens == 256
    ids = spec.placeholder.resolved({}.get)
    assert (ids.before, ids.image, ids.behind) == ((255999,), 262144, (256000,))
    assert (spec.out_hidden, spec.bidirectional) == (2560, True)


MODES: dict[str, dict[str, Any]] = {
    "dense": {},
    "w8a16": {"schemes": WeightSchemes.all(scheme_of("w8a16"))},
    "int8 keys and values": {"kv_scheme": "int8"},
}


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_compute_what_one_does_in_modes_of_precision_too(generating: Generating, mode: str) -> None:
    plan = generating.plan(**MODES[mode])
    ids, images = hidden(generating.prompts[0], generating.table, whole=True)

    def walk(runner: CpuRunner) -> torch.Tensor:
        driver = Driver(runner)
        row, text = driver.row(0, ids), driver.row(1, [4, 5, 6])
        row.images = images.parts(0, len(ids))
        row.bidirectional = [(part.first, part.rows) for part in row.images or ()]
        return torch.cat(driver.logits(row, text))

    truth = walk(load_rank(None, plan))
    with ranks(2) as on_all:
        first, second = on_all(lambda group: walk(load_rank(group, plan)))
    assert torch.equal(first, second)
    difference = (first - truth).abs()
    assert difference.median() < 1e-5
    assert difference.max() < (1e-4 if "int8" not in mode else 0.1)
