"""The same works in several engines at once, each a process with GPUs of its own: what `[engine] replicas` can reach
where routing costs nothing. Each work begins in all of them at the same time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

GATE = "GATE"  # an engine that prints it waits for a line


def gate() -> None:
    """Of an engine, before each work."""
    print(GATE, flush=True)
    if not sys.stdin.readline():
        raise SystemExit("the first process has ended")


def run_several(arguments: list[str], replicas: int, tp: int) -> None:
    """Runs ``engine.py arguments --gated`` so many times and prints what they reach together: rates are added, of times
    the longest is told. What each prints goes to standard error."""
    engines = [start(arguments, range(replica * tp, (replica + 1) * tp)) for replica in range(replicas)]
    try:
        goes_on = True
        while goes_on:
            told = [until_gate(engine, number) for number, engine in enumerate(engines)]
            for results in zip(*(results for results, _ in told), strict=True):
                print("RESULT", json.dumps(together(list(results))), flush=True)
            goes_on = all(waits for _, waits in told)
            for engine in engines if goes_on else []:
                assert engine.stdin is not None
                engine.stdin.write("\n")
                engine.stdin.flush()
        codes = [engine.wait() for engine in engines]
    finally:
        for engine in engines:
            engine.kill()
    if any(codes):
        raise SystemExit(f"engines ended with {codes}")


def start(arguments: list[str], devices: range) -> subprocess.Popen[str]:
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = shown.split(",") if shown else [str(number) for number in range(devices.stop)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(names[number] for number in devices)}
    command = [sys.executable, *arguments, "--gated"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)


def until_gate(engine: subprocess.Popen[str], number: int) -> tuple[list[dict[str, Any]], bool]:
    """Its results up to the next gate, or to its end: whether it waits."""
    results: list[dict[str, Any]] = []
    assert engine.stdout is not None
    for line in engine.stdout:
        if line.strip() == GATE:
            return results, True
        if line.startswith("RESULT "):
            results.append(json.loads(line.removeprefix("RESULT ")))
        print(f"engine {number}: {line}", end="", file=sys.stderr)
    return results, False


def together(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of the same work in all engines."""
    values = [result["value"] for result in results]
    first = results[0]
    value = max(values) if first["unit"] in ("ms", "s") else sum(values)
    told = {"work": first["work"], "value": round(value, 3), "unit": first["unit"], "replicas": len(results)}
    return told | {"each": values, **{name: first[name] for name in ("model", "card", "commit", "dtype", "mode", "tp")}}
