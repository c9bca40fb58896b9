"""Stopping under systemd: what was admitted is finished first. (That nothing is left, `service` asserts for all.)"""

from __future__ import annotations

import subprocess

import httpx

from harness import generate_stream, run
from systemd_machine import Service

TOKENS = 100


def test_a_stop_lets_a_stream_end_even_beyond_the_units_patience(service: Service) -> None:
    service.configure(engine__fake="tokens_per_second = 20")
    service.drop_in("[Service]\nTimeoutStopSec=3s\n")
    service.start()
    seen: list[subprocess.Popen[bytes]] = []

    def stop_once() -> None:
        if not seen:
            seen.append(subprocess.Popen(service.machine.command("systemctl", "stop", service.unit)))

    async def stream() -> list[int]:
        async with httpx.AsyncClient(timeout=60) as client:
            ids, _ = await generate_stream(client, service.url, "a prompt", TOKENS, stop_once)
        return ids

    assert len(run(stream())) == TOKENS
    assert seen[0].wait(60) == 0
    assert service.show("Result") == "success"
