"""A child that speaks the channel's protocol and does nothing else: `stand_in.py api|engine <channel's arguments>`.
A rank other than 0 has the kind "engine.RANK".

It obeys $STAND_IN/<kind>.json, read when it starts (later ones `live` at each turn), and writes each message that it
gets to $STAND_IN/<kind>-<number>.jsonl with the time of its arrival.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from lightllmd.ipc import child_setup as child
from lightllmd.ipc.flight_record import Flight, FlightRecorder
from lightllmd.ipc.messages import (
    EngineConfigure,
    Failed,
    Heartbeat,
    Overview,
    Prepare,
    Prepared,
    Probe,
    Probed,
    Retire,
    Sleep,
    Stop,
    Wake,
)

HOME = Path(os.environ["STAND_IN"])


def orders(name: str) -> dict:
    try:
        return json.loads((HOME / f"{name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def main() -> None:
    kind = sys.argv[1]
    link = child.adopt(sys.argv[2:])
    first = child.first_message(link)
    number = first.generation if isinstance(first, EngineConfigure) else first.epoch
    if isinstance(first, EngineConfigure) and first.rank:
        kind = f"{kind}.{first.rank}"  # what follows rank 0 has orders and a record of its own
    told = orders(kind)
    record = (HOME / f"{kind}-{number}.jsonl").open("a", buffering=1)
    if told.get("stop_self"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if told.get("ignore_term"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "unproven" in told:
        flight = Flight(step=1, kind="prefill", rows=1, unproven=told["unproven"], quarantined=told["unproven"][-1])
        FlightRecorder(int(sys.argv[4])).write(flight)
    if told.get("orphan"):
        # Its parent, a shell, ends at once: only the subreaper is left to take it.
        subprocess.run(["sh", "-c", f"sleep {told['orphan']} & echo $! > {HOME}/orphan"], check=True)
    if "fail" in told:
        link.send(Failed(told["fail"]["kind"], told["fail"]["message"]))
    if "exit" in told:
        print("last words", file=sys.stderr, flush=True)
        sys.exit(told["exit"])
    print(f"{kind} {number} begins", flush=True)
    print("<4>a warning", flush=True)
    born, turns, asleep = time.monotonic(), 0, False
    while True:
        turns += 1
        age = time.monotonic() - born
        live = orders("live")
        loading = age < told.get("load_seconds", 0) and not live.get("loaded")
        phase = "load" if loading else "asleep" if asleep else told.get("phase", "ready")
        hangs = live.get("hang") == kind or told.get("hang_in") == phase
        stats = {key: float(value) for key, value in live.get(kind, {}).items()}
        progress = int(min(age / max(told.get("load_seconds", 0), 0.001), 1) * 20e9) if loading else turns
        link.send(Heartbeat(phase, 0 if hangs else progress, busy=hangs or loading, total=20_000_000_000, stats=stats))
        if live.get("dying") == kind:  # as a process whose GPU the kernel takes its time to release
            link.close()
            signal.pause()
        select.select([link], [], [], 0.05)
        for message in link.receive():
            if isinstance(message, Overview):
                continue  # which comes whenever anything changed
            fields = {name: getattr(message, name) for name in message.__struct_fields__ if name != "plan"}
            record.write(
                json.dumps({"at": time.time(), "message": type(message).__name__, **fields}, default=repr) + "\n"
            )
            if isinstance(message, Prepare):
                link.send(Prepared(message.revision, told.get("prepare_error", "")))
            if isinstance(message, Probe) and (answer := live.get("probe", "")) is not None:
                link.send(Probed(message.number, answer))
            if isinstance(message, Sleep | Wake):
                asleep = isinstance(message, Sleep)
            if isinstance(message, Stop | Retire) and not told.get("ignore_stop"):
                sys.exit(0)


main()
