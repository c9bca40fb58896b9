"""A batch file through an `LLM`: requests enter as there is room, and answers are written as they end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightllmd.api.dialects.dialect import Translation
from lightllmd.api.dialects.embeddings import EMBEDDINGS
from lightllmd.api.dialects.openai.routes import CHAT, COMPLETIONS
from lightllmd.api.web.bodies import decode
from lightllmd.api.web.errors import openai_error
from lightllmd.batch.lines import Line, Results, count, read
from lightllmd.errors import InvalidRequest, RequestFailed
from lightllmd.offline import LLM
from lightllmd.offline_jobs import OfflineJob, ScoreJob
from lightllmd.requests.scoring import ScoresAsked

ROUTES: dict[str, Translation[Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETIONS,
    "/v1/embeddings": EMBEDDINGS,
}


@dataclass
class BatchCounts:
    """What became of the lines."""

    total: int = 0
    completed: int = 0  # answered with 200
    failed: int = 0
    skipped: int = 0  # an earlier run answered them


@dataclass(eq=False)
class _Request:
    """One line on its way. Its jobs are what an answer's entries are made of."""

    custom_id: str
    reply: Any
    jobs: list[OfflineJob | ScoreJob]
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = len(self.jobs)


def run_batch(llm: LLM, source: Path, target: Path, *, progress: bool = True) -> BatchCounts:
    """Reads `source`, appends to `target`. Lines whose ``custom_id`` the target has are passed over, so that the same
    call goes on where one was broken off. A line that is wrong costs itself alone: its error is in its place.

    Raises OSError, and EngineError when the engine can't go on.
    """
    results = Results(target)
    try:
        with source.open("rb") as file:
            batch = _Batch(llm, results)
            llm.run_jobs(batch.jobs(file), batch.ended, count(source) if progress else None)
            return batch.counts
    finally:
        results.close()


class _Batch:
    def __init__(self, llm: LLM, results: Results) -> None:
        self.counts = BatchCounts()
        self._llm, self._results = llm, results
        self._of: dict[OfflineJob | ScoreJob, _Request] = {}
        # What translations know of a revision.
        self._revision: Any = SimpleNamespace(
            plan=llm.plan, model_name=llm.plan.model_name, tokenizer=llm.tokenizer, intake=llm.intake
        )

    def jobs(self, file: Any) -> Iterator[OfflineJob | ScoreJob]:
        """Of all lines, made when they are asked for."""
        with asyncio.Runner() as runner:
            for number, line in read(file):
                self.counts.total += 1
                if isinstance(line, InvalidRequest):
                    self._refuse(None, "invalid_json_line", line.message)
                    continue
                if not self._results.add(line.custom_id):
                    self.counts.skipped += 1
                    continue
                try:
                    request = runner.run(self._request(line, number))
                except InvalidRequest as refusal:
                    self._answer(line.custom_id, refusal.status, openai_error(refusal))
                    continue
                self._of |= dict.fromkeys(request.jobs, request)
                yield from request.jobs

    async def _request(self, line: Line, number: int) -> _Request:
        """Raises InvalidRequest."""
        translation = ROUTES.get(line.url)
        if line.method != "POST" or translation is None:
            raise InvalidRequest(
                f"line {number}: {line.method} {line.url} is not available in a batch; POST to {', '.join(ROUTES)} is",
                param="url",
            )
        body = decode(bytes(line.body), translation.body, set())
        if translation.streamed(body):
            raise InvalidRequest("stream: a batch has no streams; got true", param="stream")
        asked = translation.asked(body)
        checked = await self._llm.intake.of(asked)
        reply = await translation.reply(self._revision, body, checked)
        if isinstance(asked, ScoresAsked):
            return _Request(line.custom_id, reply, [ScoreJob(job) for job in checked])  # type: ignore[arg-type]
        tokenizer = self._llm.tokenizer
        return _Request(line.custom_id, reply, [OfflineJob(job, tokenizer) for job in checked])  # type: ignore[arg-type]

    def ended(self, job: OfflineJob | ScoreJob) -> None:
        """Writes the answer of a request whose last job this was."""
        request = self._of.pop(job)
        request.left -= 1
        if request.left:
            return
        if any(branch.finish == "abort" for job in request.jobs for branch in job.branches):
            broken = RequestFailed("the model's logits for this request are not numbers (NaN)")
            self._answer(request.custom_id, broken.status, openai_error(broken))
        else:
            pending = SimpleNamespace(entries=request.jobs)
            self._answer(request.custom_id, 200, request.reply.whole(pending))
        self._results.flush()

    def _answer(self, custom_id: str, status: int, body: Any) -> None:
        self.counts.completed += status == 200
        self.counts.failed += status != 200
        self._results.answer(custom_id, status, body)

    def _refuse(self, custom_id: str | None, code: str, message: str) -> None:
        self.counts.failed += 1
        self._results.refuse(custom_id, code, message)
