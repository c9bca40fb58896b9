"""What clients see of the connection beneath the routes: bounds before the key is checked, ends of streams, names."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from typing import Any

import pytest

from api.frontend_harness import PATIENCE, Stack, expected, run, stack, until


async def opened(one: Stack, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
    writer.write(data)
    return reader, writer


async def whole(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(PATIENCE):
        return await reader.read()


def post(path: str, body: dict[str, Any], *lines: str, version: str = "1.1") -> bytes:
    raw = json.dumps(body).encode()
    head = [f"POST {path} HTTP/{version}", "Host: x", *lines, f"Content-Length: {len(raw)}"]
    return "\r\n".join([*head, "", ""]).encode() + raw


def chunks(body: bytes) -> list[bytes]:
    found = []
    while body:
        size, _, body = body.partition(b"\r\n")
        found.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return found


def test_a_flood_of_headers_is_refused_in_the_dialect_of_its_route_before_the_key_is_looked_at(tmp_path):
    (tmp_path / "keys").write_text("secret\n")

    async def test() -> None:
        async with stack(tmp_path, engine=False, api_keys_file=str(tmp_path / "keys")) as one:
            many = b"".join(b"x-%d: y\r\n" % number for number in range(1000))
            reader, writer = await opened(one, b"POST /v1/completions HTTP/1.1\r\n" + many)
            answer = await whole(reader)
            assert answer.startswith(b"HTTP/1.1 431 ")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
            writer.close()
            reader, writer = await opened(one, b"GET /generate?" + b"a" * 10_000)
            answer = await whole(reader)
            assert answer.startswith(b"HTTP/1.1 414 ")
            assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"message": "the URL is longer than 8192 bytes"}
            writer.close()

    run(test())


@pytest.mark.parametrize("usage", [False, True])
def test_done_comes_in_a_chunk_of_its_own(tmp_path, usage):
    async def test() -> None:
        async with stack(tmp_path) as one:
            body = {"prompt": "a", "max_tokens": 3, "stream": True, "ignore_eos": True}
            if usage:
                body["stream_options"] = {"include_usage": True}
            reader, writer = await opened(one, post("/v1/completions", body, "Connection: close"))
            found = chunks((await whole(reader)).partition(b"\r\n\r\n")[2])
            assert found[-2:] == [b"data: [DONE]\n\n", b""]
            assert b"[DONE]" not in b"".join(found[:-2])
            writer.close()

    run(test())


def test_a_client_of_http_1_0_reads_a_stream_without_chunks(tmp_path):
    async def test() -> None:
        async with stack(tmp_path) as one:
            body = {"inputs": "a", "parameters": {"max_new_tokens": 3, "ignore_eos": True}}
            reader, writer = await opened(one, post("/generate_stream", body, version="1.0"))
            header, _, frames = (await whole(reader)).partition(b"\r\n\r\n")
            assert b"transfer-encoding" not in header
            assert re.fullmatch(rb"(data:\{.*\}\n\n){3}", frames)
            writer.close()

    run(test())


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_closed_its_sending_side_alone_gets_its_whole_answer(tmp_path, path):
    async def test() -> None:
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            body = {"inputs": "abc", "parameters": {"max_new_tokens": 5, "ignore_eos": True}}
            reader, writer = await opened(one, post(path, body))
            await engine.submitted(1)
            writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
            connections = one.worker._server.traffic.connections
            await until(lambda: any(connection._half_closed for connection in connections))
            for connection in list(connections):  # the server looks for a reader twice a second
                connection.check(asyncio.get_running_loop().time() + 1)
            assert one.stats["in_flight"] == 1
            engine.free_run = True
            answer = await whole(reader)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.count(b'"text"') == 5 or json.dumps(expected("abc", 5)).encode() in answer
            writer.close()

    run(test())


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_closed_its_connection_cancels_its_request(tmp_path, path):
    async def test() -> None:
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            body = {"inputs": "abc", "parameters": {"max_new_tokens": 5, "ignore_eos": True}}
            _, writer = await opened(one, post(path, body))
            await engine.submitted(1)
            writer.close()
            await until(lambda: one.stats["cancelled"] == 1)
            await until(lambda: engine.aborts)

    run(test())


def test_a_stream_without_news_notices_that_its_client_is_gone(tmp_path):
    async def test() -> None:
        async with stack(tmp_path, engine=False, hold_keepalive=60) as one:
            engine = await one.up()
            body = {"inputs": "abc", "parameters": {"max_new_tokens": 5, "ignore_eos": True}}
            reader, writer = await opened(one, post("/generate_stream", body))
            await engine.submitted(1)
            engine.step()
            await reader.readuntil(b"data:")
            writer.close()
            await until(lambda: one.stats["cancelled"] == 1)

    run(test())


def test_each_answer_names_its_request(tmp_path):
    async def test() -> None:
        async with stack(tmp_path) as one:
            for path, status in (("/health", 200), ("/nothing", 404)):
                answer = await one.client.get(path, headers={"x-request-id": "mine-1"})
                assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine-1")
            assert re.fullmatch("[0-9a-f]{32}", (await one.generate("a", max_new_tokens=1)).headers["x-request-id"])

    run(test())


def test_a_body_leaves_the_count_when_it_is_decoded(tmp_path):
    async def test() -> None:
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            asking = asyncio.create_task(one.generate("a" * 100, max_new_tokens=1))
            await engine.submitted(1)
            assert one.worker._server.traffic.bodies.held == 0
            engine.free_run = True
            await asking

    run(test())


def test_a_full_front_end_says_so(tmp_path):
    async def test() -> None:
        async with stack(tmp_path, max_connections=2) as one:
            silent = [await opened(one, b"GE") for _ in range(2)]
            await until(lambda: one.worker._server.traffic.stats()["connections"] == 2)
            assert (await one.client.get("/health")).status_code == 200
            assert one.worker._server.traffic.stats()["connections_full"] == 1
            for _, writer in silent:
                writer.close()

    run(test())
