"""A real Pushgateway, where there is one: $LIGHTLLMD_PUSHGATEWAY or on PATH (Debian: prometheus-pushgateway)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness import free_port, wait_for


def program(variable: str, *names: str) -> str:
    """Its path; skips the test where there is none."""
    found = os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no {names[0]} on PATH, nor ${variable}")
    return found


@contextmanager
def pushgateway(port: int | None = None, *options: str) -> Iterator[str]:
    """Its address."""
    address = f"127.0.0.1:{port or free_port()}"
    command = [program("LIGHTLLMD_PUSHGATEWAY", "prometheus-pushgateway", "pushgateway")]
    with subprocess.Popen(
        [*command, f"--web.listen-address={address}", "--persistence.file=", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_for(lambda: answers(address), what="the gateway")
            yield address
        finally:
            process.terminate()


def answers(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}/-/ready", trust_env=False).status_code in (200, 401)
    except httpx.TransportError:
        return False


def lint(text: str) -> str:
    """What `promtool check metrics` has to say; empty: all is well."""
    promtool = program("LIGHTLLMD_PROMTOOL", "promtool")
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr + ("" if done.returncode == 0 else f"exit {done.returncode}")


def samples(text: bytes | str, without: dict[str, str] | None = None) -> dict[str, float]:
    """Name and labels -> value, of our metrics. `without`: labels that each has to have, and that are left out."""
    text = text.decode() if isinstance(text, bytes) else text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if "le" in labels:
                labels["le"] = repr(float(labels["le"]))  # the gateway writes numbers in its own way
            strange = any(labels.pop(name, "") != value for name, value in (without or {}).items())
            if sample.name.startswith("lightllm_") and not strange:
                said = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
                found[sample.name + (f"{{{said}}}" if said else "")] = sample.value
    return found
