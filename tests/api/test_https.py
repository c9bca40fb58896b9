"""An api worker that serves HTTPS: what it was told of the certificate is in force for new connections, and told on."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import httpx
import pytest

from api.frontend_harness import Stack, expected, frames, run, stack, until
from lightllmd.config import tls
from lightllmd.ipc.messages import Tls
from tls_files import Made, make


def told(made: Made, broken: bool = False):
    pair = tls.read(str(made.certificate), str(made.key))
    return Tls(pair.certificate, pair.key, pair.client_ca, pair.expires, broken)


def gauges(one: Stack) -> dict[str, float | None]:
    registry = one.worker._accounts._metrics.registry
    names = ("expiry", "broken")
    return {name: registry.get_sample_value(f"lightllm_tls_certificate_{name}") for name in names}


def test_a_stream_goes_on_under_the_certificate_that_it_began_with(tmp_path: Path) -> None:
    first, second = make(tmp_path, "first"), make(tmp_path, "second", days=50)

    async def scenario() -> None:
        async with stack(tmp_path, engine=False, tls=told(first), **first.settings) as one:
            engine = await one.up()
            base = f"https://localhost:{one.port}"
            async with httpx.AsyncClient(base_url=base, verify=first.client()) as old:
                body = {"inputs": "x", "parameters": {"max_new_tokens": 5}}
                answer = asyncio.create_task(old.post("/generate_stream", json=body))
                await engine.submitted(1)
                engine.step()
                one.tell(told(second))
                await until(lambda: gauges(one)["expiry"] == told(second).expires)
                async with httpx.AsyncClient(base_url=base, verify=second.client()) as new:
                    assert (await new.get("/health")).status_code == 200
                engine.free_run = True
                assert "".join(frame["token"]["text"] for frame in frames((await answer).text)) == expected("x", 5)
            with pytest.raises(httpx.ConnectError):
                async with httpx.AsyncClient(base_url=base, verify=first.client()) as late:
                    await late.get("/health")
            one.tell(told(second, broken=True))
            await until(lambda: gauges(one)["broken"] == 1)
            one.tell(told(second))
            await until(lambda: gauges(one)["broken"] == 0)
            # Its own clients speak TLS now.
            await one.client.aclose()
            one.client = httpx.AsyncClient(base_url=base, verify=second.client())

    run(scenario())


def test_plain_http_on_an_https_port_is_closed_and_without_tls_there_are_no_such_metrics(tmp_path: Path) -> None:
    made = make(tmp_path)

    async def scenario() -> None:
        async with stack(tmp_path, tls=told(made), **made.settings) as one:
            with pytest.raises(httpx.HTTPError):
                await one.client.get("/health")
        async with stack(tmp_path) as one:
            assert gauges(one) == {"expiry": None, "broken": None}

    run(scenario())


def test_the_scheme_is_told_to_the_application(tmp_path: Path) -> None:
    made = make(tmp_path)

    async def scenario() -> str:
        async with stack(tmp_path, tls=told(made), **made.settings) as one:
            schemes = []
            app = one.worker._server.config.loaded_app

            async def noting(scope, receive, send):
                schemes.append(scope["scheme"])
                await app(scope, receive, send)

            one.worker._server.config.loaded_app = noting
            async with httpx.AsyncClient(base_url=f"https://localhost:{one.port}", verify=made.client()) as client:
                await client.get("/health")
            return schemes[0]

    assert run(scenario()) == "https"


def test_a_context_takes_no_renegotiation_and_no_compression(tmp_path: Path) -> None:
    made = make(tmp_path)
    context = tls.context(tls.read(str(made.certificate), str(made.key)))
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert context.options & ssl.OP_NO_COMPRESSION
