"""Named keys: which headers bring them, which routes they open, and what is told, counted and logged of the others."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path

import pytest

from api.frontend_harness import ScriptedEngine, make_plan, run, stack
from lightllmd.api.web.auth import AcceptedKeys
from lightllmd.api.web.refusals import EVERY, Refusals
from lightllmd.config import keys
from lightllmd.config.keys import ApiKey, KeyRing
from lightllmd.errors import Forbidden, Unauthorized
from lightllmd.ipc import messages


async def first_token(engine: ScriptedEngine) -> None:
    """Without it the answer's header waits for a comment."""
    await engine.submitted(1)
    engine.step()


def table(folder: Path, **fields: str) -> str:
    """Of keys that are called as they are hashed, each with further fields."""
    file = folder / "keys.toml"
    entries = [f'[keys.{name}]\nsha256 = "{keys.hashed(name)}"\n{more}\n' for name, more in fields.items()]
    file.write_text("[keys]\n" + "\n".join(entries))
    file.chmod(0o640)
    return str(file)


def test_each_clients_header_brings_a_key(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, api_keys_file=table(tmp_path, alice="")) as one:

            async def status(**headers: str) -> int:
                given = {name.replace("_", "-"): value for name, value in headers.items()}
                return (await one.client.get("/v1/models", headers=given)).status_code

            assert await status() == await status(Authorization="Bearer wrong") == await status(x_api_key="") == 401
            assert await status(Authorization="Bearer alice") == await status(authorization="bearer  alice") == 200
            assert await status(x_api_key="alice") == await status(api_key="alice") == 200
            assert await status(Authorization="Basic abc", x_api_key="alice") == 200
            assert await status(Authorization="Bearer wrong", api_key="alice") == 200
            assert await status(x_api_key="Bearer alice") == 401

    run(scenario())


GOLDEN = {
    ("/generate", 401): {
        "message": "a valid API key is required: Authorization: Bearer KEY (x-api-key and api-key do, too)"
    },
    ("/v1/models", 401): {
        "error": {
            "message": "a valid API key is required: Authorization: Bearer KEY (x-api-key and api-key do, too)",
            "type": "authentication_error",
            "param": None,
            "code": "invalid_api_key",
        }
    },
    ("/metrics", 403): {"message": "the API key alice does not open /metrics: that takes a key with admin = true"},
}


def test_anthropics_clients_are_told_in_their_words(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, api_keys_file=table(tmp_path, alice="")) as one:
            answer = await one.client.post("/v1/messages", json={})
            assert answer.status_code == 401
            assert answer.json()["error"] == {
                "type": "authentication_error",
                "message": GOLDEN["/generate", 401]["message"],
            }
            headers = {"x-api-key": "alice", "anthropic-version": "2023-06-01"}
            answer = await one.client.get("/metrics", headers=headers)
            assert answer.status_code == 403
            assert answer.json()["error"] == {
                "type": "permission_error",
                "message": GOLDEN["/metrics", 403]["message"],
            }

    run(scenario())


@pytest.mark.parametrize("tgi", [False, True])
def test_refusals_are_told_as_each_dialect_tells_errors(tmp_path: Path, tgi: bool) -> None:
    golden = dict(GOLDEN)
    if tgi:
        message = golden["/generate", 401]["message"]
        golden["/generate", 401] = {"error": message, "error_type": "unauthorized"}
        golden["/metrics", 403] = {"error": golden["/metrics", 403]["message"], "error_type": "forbidden"}

    async def scenario() -> None:
        async with stack(tmp_path, {"use_tgi_api": tgi}, api_keys_file=table(tmp_path, alice="")) as one:
            for (path, status), body in golden.items():
                headers = {"x-api-key": "alice"} if status == 403 else {}
                answer = await one.client.get(path, headers=headers)
                assert (answer.status_code, answer.json()) == (status, body)
                assert ("www-authenticate" in answer.headers) == (status == 401)

    run(scenario())


def test_operators_routes_take_an_operators_key_and_health_none(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = table(tmp_path, alice="", root="admin = true")
        async with stack(tmp_path, api_keys_file=file) as one:

            async def status(path: str, key: str) -> int:
                return (await one.client.get(path, headers={"x-api-key": key})).status_code

            for path in ("/docs", "/openapi.json"):
                assert [await status(path, key) for key in ("alice", "root", "")] == [403, 200, 401]
            assert [await status("/docs/any", key) for key in ("alice", "root", "")] == [403, 404, 401]
            assert await status("/metrics", "alice") == 403
            for path in ("/health", "/liveness", "/readiness"):
                assert await status(path, "") == 200
            for path in ("/v1/models", "/get_model_name", "/docsy"):
                assert await status(path, "alice") in (200, 404)

    run(scenario())


def test_browsers_open_operators_routes_with_the_key_as_password(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, api_keys_file=table(tmp_path, alice="", root="admin = true")) as one:
            asked = await one.client.get("/docs")
            assert asked.headers["www-authenticate"] == 'Basic realm="lightllmd", Bearer'

            async def status(path: str, user: str, password: str) -> int:
                return (await one.client.get(path, auth=(user, password))).status_code

            assert await status("/docs", "any", "root") == await status("/openapi.json", "", "root") == 200
            assert (await status("/docs", "any", "alice"), await status("/docs", "root", "wrong")) == (403, 401)
            assert await status("/v1/models", "any", "root") == 401
            for value in ("Basic", "Basic !", "Basic cm9vdA=="):
                assert (await one.client.get("/docs", headers={"Authorization": value})).status_code == 401

    run(scenario())


def scope(path: str = "/v1/models", **headers: str) -> dict[str, object]:
    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": "GET", "path": path, "headers": given, "client": ("192.0.2.7", 1)}


def test_a_key_is_refused_from_the_moment_that_it_expires() -> None:
    now = 1000.0
    key = ApiKey(name="alice", sha256=keys.hashed("k"), expires=1500.0)
    accepted = AcceptedKeys(KeyRing([key]), clock=lambda: now)
    assert accepted.admit(scope(x_api_key="k")) == key
    now = 1500.0
    with pytest.raises(Unauthorized, match="the API key alice expired at 1970-01-01T00:25:00"):
        accepted.admit(scope(x_api_key="k"))


def test_a_key_of_requests_does_not_open_metrics_that_have_keys_of_their_own() -> None:
    ring = KeyRing([ApiKey(sha256=keys.hashed("k"), admin=True)], [ApiKey(sha256=keys.hashed("m"), admin=True)])
    accepted = AcceptedKeys(ring)
    with pytest.raises(Forbidden, match=r"\[http\] metrics_key"):
        accepted.admit(scope("/metrics", x_api_key="k"))
    assert accepted.admit(scope("/metrics", x_api_key="m"))
    with pytest.raises(Unauthorized):
        accepted.admit(scope(x_api_key="m"))


def test_a_revoked_key_is_refused_from_the_message_on_and_a_stream_goes_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = table(tmp_path, alice="", bob="")
        async with stack(tmp_path, api_keys_file=file, engine=False) as one:
            engine = await one.up()
            body = {"inputs": "x", "parameters": {"max_new_tokens": 4}}
            first = asyncio.create_task(first_token(engine))
            async with one.client.stream(
                "POST", "/generate_stream", json=body, headers={"x-api-key": "alice"}
            ) as stream:
                await first
                one.tell(messages.Keys(keys.encode(KeyRing(keys.read(table(tmp_path, bob=""))))))
                while (await one.client.get("/v1/models", headers={"x-api-key": "alice"})).status_code == 200:
                    pass
                engine.free_run = True
                text = "".join([part async for part in stream.aiter_text()])
            assert text.count("data:") == 4
            assert (await one.client.get("/v1/models", headers={"x-api-key": "bob"})).status_code == 200

    run(scenario())


def test_refusals_are_counted_and_logged_at_a_bounded_rate_without_the_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "sk-a-secret-of-nobody"

    async def scenario() -> dict[str, float]:
        async with stack(tmp_path, api_keys_file=table(tmp_path, alice="")) as one:
            for _ in range(50):
                answer = await one.client.get("/v1/models", headers={"Authorization": f"Bearer {secret}"})
                assert secret not in answer.text
            await one.client.get("/metrics", headers={"x-api-key": "alice"})
            registry = one.worker._accounts._metrics.registry
            names = ("unauthorized", "forbidden")
            return {name: registry.get_sample_value("lightllm_key_refusal_total", {"reason": name}) for name in names}

    with caplog.at_level(logging.INFO):
        assert run(scenario()) == {"unauthorized": 50, "forbidden": 1}
    lines = [record.getMessage() for record in caplog.records if "API key" in record.getMessage()]
    assert lines[0] == "401 to 127.0.0.1 for '/v1/models': API key unknown"
    assert lines[1].startswith("403 to 127.0.0.1 for '/metrics'")
    assert len(lines) == 2
    assert not re.search(f"{secret}|{keys.hashed(secret)[:8]}", caplog.text)


def test_a_log_line_tells_how_many_came_since_the_one_before(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    refusals = Refusals(lambda scope: "192.0.2.7", lambda reason: None, clock=lambda: now)
    refusal = Unauthorized("no", why="missing")
    for _ in range(7):
        refusals.note(scope("/a\nb"), refusal)
    now = EVERY
    refusals.note(scope(), refusal)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == r"401 to 192.0.2.7 for '/a\nb': API key missing"
    assert second.endswith("; 6 more since the line before")


def test_a_plan_holds_no_key_of_a_list(tmp_path: Path) -> None:
    file = tmp_path / "list"
    file.write_text("sk-in-a-list\n")
    assert "sk-in-a-list" not in repr(make_plan(api_keys_file=str(file)))
