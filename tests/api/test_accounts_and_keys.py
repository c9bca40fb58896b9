"""Each request that enters is counted once at its end; /metrics is read by those whom the operator lets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.frontend_harness import run, stack, until
from lightllmd.api.web.auth import AcceptedKeys, KeyedAccess
from lightllmd.api.web.errors import ErrorAnswers
from lightllmd.api.web.refusals import Refusals
from lightllmd.config.load import load
from lightllmd.config.parameters import Config
from lightllmd.errors import ConfigInvalid, RequestFailed


def test_counts_balance_whatever_becomes_of_a_request(tmp_path):
    async def scenario():
        async with stack(tmp_path, {"running_max_req_size": 8}, engine=False, max_held=2) as one:
            counted = one.worker._accounts._metrics.registry.get_sample_value

            def totals() -> list[int]:
                names = ("count", "success", "failure", "cancelled")
                return [int(counted(f"lightllm_request_{name}_total")) for name in names]

            async def leaves(path: str, body: dict[str, Any], then) -> None:
                request = asyncio.create_task(one.client.post(path, json=body))
                await until(then)
                request.cancel()
                await asyncio.gather(request, return_exceptions=True)

            batch = asyncio.create_task(one.client.post("/v1/completions", json={"prompt": ["a", "b"]}))
            await until(lambda: one.ledger.in_flight == 2)
            assert (await one.generate("one too many to be held")).status_code == 429
            batch.cancel()
            await until(lambda: totals() == [3, 0, 1, 2])
            await leaves("/generate", {"inputs": "x"}, lambda: one.ledger.in_flight)
            await until(lambda: totals() == [4, 0, 1, 3])
            gate = one.worker.revisions.gate
            gate.hold()
            for path in ("/generate", "/generate_stream"):
                await leaves(path, {"inputs": "x"}, lambda: gate.waiting)
                await until(lambda: not gate.waiting)
            gate.release()
            await until(lambda: totals() == [6, 0, 1, 5])
            engine = await one.up()
            await leaves("/generate_stream", {"inputs": "x"}, lambda: engine.submits)
            await until(lambda: totals() == [7, 0, 1, 6])
            _, writer = await asyncio.open_connection("127.0.0.1", one.port)
            writer.write(b'POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"inputs"')
            await writer.drain()
            writer.close()
            await until(lambda: totals() == [8, 0, 1, 7])
            engine.free_run = True
            assert (await one.generate("x", n=2)).status_code == 200
            assert (await one.generate("x", n=0)).status_code == 400
            assert totals() == [10, 1, 2, 7]
            engine.free_run = False
            failing = asyncio.create_task(one.generate("x"))
            await until(lambda: one.ledger.in_flight)
            one.ledger.fail_all(RequestFailed("broken"))
            assert (await failing).status_code == 500
            assert totals() == [11, 1, 3, 7]

    run(scenario())


UNNOTED = Refusals(lambda scope: "", lambda reason: None)


def asked(config: Config, path: str, key: str | None) -> int:
    """The status that a request for `path` gets, in whichever header the key is."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask() -> int:
        transport = httpx.ASGITransport(KeyedAccess(app, AcceptedKeys(config.keys), ErrorAnswers({}), UNNOTED))
        forms = [{}] if key is None else [{"Authorization": f"Bearer {key}"}, {"X-Api-Key": key}, {"api-key": key}]
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            statuses = {(await client.get(path, headers=headers)).status_code for headers in forms}
        assert len(statuses) == 1
        return statuses.pop()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("api", "metrics", "opens_metrics", "opens_the_rest"),
    [
        (True, "", {"api"}, {"api"}),
        (True, "none", {None, "api", "own", "wrong"}, {"api"}),
        (True, "file", {"own"}, {"api"}),
        (False, "file", {"own"}, {None, "api", "own", "wrong"}),
        (False, "", {None, "api", "own", "wrong"}, {None, "api", "own", "wrong"}),
    ],
)
def test_who_may_read_metrics_is_a_setting(
    tmp_path: Path, api: bool, metrics: str, opens_metrics: set[str | None], opens_the_rest: set[str | None]
) -> None:
    for name in ("api", "own"):
        (tmp_path / name).write_text(f"{name}\n")
    files = {
        "http.api_keys_file": str(tmp_path / "api") if api else "",
        "http.metrics_key": str(tmp_path / "own") if metrics == "file" else metrics,
    }
    config = load(None, {"engine.backend": "fake", **files})
    everyone = (None, "api", "own", "wrong")
    assert {key for key in everyone if asked(config, "/metrics", key) == 200} == opens_metrics
    assert {key for key in everyone if asked(config, "/v1/models", key) == 200} == opens_the_rest
    assert all(asked(config, "/health", key) == 200 for key in everyone)


def test_a_metrics_key_file_without_keys_is_refused_by_its_setting(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# none yet\n")
    with pytest.raises(ConfigInvalid, match=r"http\.metrics_key: .* has no key"):
        load(None, {"engine.backend": "fake", "http.metrics_key": str(tmp_path / "empty")})
