"""`StandInDaemon`: the real supervisor process with stand-in children that obey files in a folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx

from harness import Daemon, wait_for

SCRIPT = str(Path(__file__).with_name("supervisor") / "stand_in_daemon.py")
QUICK = ("--supervisor.abort_grace", "0.2", "--supervisor.stop_timeout", "3", "--supervisor.backoff_initial", "0.1")


class StandInDaemon(Daemon):
    def __init__(self, folder: Path, *flags: str, **options: Any) -> None:
        super().__init__(folder, *QUICK, *flags, **options)
        self.command[1:3] = [SCRIPT]
        assert self.command[0] == sys.executable
        self.home = folder / "home"
        self.home.mkdir(exist_ok=True)
        os.environ["STAND_IN"] = str(self.home)

    def order(self, name: str, **orders: Any) -> None:
        """What the next child of that kind does; `live`: what all do from now on."""
        partial = self.home / f"{name}.partial"
        partial.write_text(json.dumps(orders))
        partial.rename(self.home / f"{name}.json")

    def heard(self, child: str, message: str = "") -> list[dict[str, Any]]:
        """The messages that a child got, such as "api-1" (kind and number)."""
        path = self.home / f"{child}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for record in map(json.loads, lines) if message in ("", record["message"])]

    def wait_heard(self, child: str, message: str) -> dict[str, Any]:
        return wait_for(lambda: self.heard(child, message), 30, f"{message} for {child}")[-1]

    def worker(self, name: str) -> dict[str, Any]:
        status = self.status()
        assert status is not None
        return next(worker for worker in status["workers"] if worker["name"] == name)

    def wait_worker(self, name: str, **fields: Any) -> dict[str, Any]:
        def settled() -> dict[str, Any] | None:
            worker = self.worker(name)
            return worker if all(worker[key] == value for key, value in fields.items()) else None

        return wait_for(settled, 30, f"{name} with {fields}")

    def ask(self, verb: str, body: dict[str, Any] | None = None, **headers: str) -> httpx.Response:
        with self.control_client() as client:
            return client.post(
                f"/v1/{verb}", json=body or {}, headers={"If-Match": headers["premise"]} if headers else {}
            )

    def wait_job(self, answer: httpx.Response) -> dict[str, Any]:
        """The job's last word, from its stream."""
        assert answer.status_code == 202, answer.text
        with self.control_client() as client:
            stream = client.get(f"/v1/jobs/{answer.json()['id']}", timeout=60)
        return json.loads(stream.text.strip().splitlines()[-1])

    def exit_code(self) -> int:
        assert self.process is not None
        return self.process.wait(30)
