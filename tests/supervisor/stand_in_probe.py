"""A probe that finds a GPU: `$STAND_IN/probe.json` says how many bytes are free on it, that the probe hangs, or
by how many bytes the plan is to grow."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import msgspec

from lightllmd.config.plan import DeviceFacts, Facts

request = json.loads(sys.stdin.buffer.read())
home = Path(os.environ["STAND_IN"])
told = json.loads((home / "probe.json").read_text())
with (home / "probed.jsonl").open("a") as record:
    record.write(json.dumps(request) + "\n")
if told.get("hang"):
    signal.pause()
if told.get("fail"):
    sys.exit("the driver says no")
types = ["float16", "x" * told.get("padding", 0)]
device = DeviceFacts("cuda", "Stand-in GPU", 1, 80 * 10**9, told["free"], types, 1)
sys.stdout.buffer.write(msgspec.json.encode(Facts(None, device)))
