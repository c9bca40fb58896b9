"""The visual workers: one for each revision whose plan has images, for as long as that revision's engines are wanted.

What should be there follows from the engines alone, so that a swap, a rollback, sleep and the end of the daemon need
say nothing here. Neither readiness nor requests of text depend on a visual worker, but a revision is put in force only
once its own is ready.
"""

from __future__ import annotations

from pathlib import Path

from lightllmd.ipc.images import visual_path
from lightllmd.ipc.messages import VisualConfigure
from lightllmd.supervisor.children.child import Child
from lightllmd.supervisor.children.exits import Ending
from lightllmd.supervisor.children.worker import Worker
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.snapshot import WorkerStatus
from lightllmd.supervisor.workers.engines import Engines
from lightllmd.supervisor.workers.replicas import Replicas

KIND = "visual"


class Visual:
    """That of one revision."""

    def __init__(self, context: Context, replicas: Replicas) -> None:
        self._context, self.replicas = context, replicas
        self.worker = replicas.visual = Worker(context, KIND, 0, self._launch)
        self._path = visual_path(str(context.runtime.ipc), replicas.revision)
        self.wanted = True

    def _launch(self, number: int) -> Child:
        context, plan = self._context, self.replicas.plan
        assert plan is not None
        assert plan.vision is not None
        child = Child(context, self.worker.name, context.commands.visual)
        metrics_id = context.runtime.take_metrics_id(KIND)
        first = VisualConfigure(
            plan=self.replicas.encoded,
            path=self._path,
            secret=context.image_secret,
            metrics_dir=str(context.runtime.metrics),
            metrics_id=metrics_id,
            device=plan.vision.devices[0] if plan.vision.devices else None,
        )
        child.configure(self.worker.name, number, metrics_id, first)
        return child

    def rename(self, name: str) -> None:
        """In status and log, from now on."""
        self.worker.name = name
        if self.worker.child is not None:
            self.worker.child.worker = name

    def end(self, why: str) -> None:
        """For good, or until it is wanted again."""
        self.wanted = False
        self.worker.due = self.worker.due_at = None
        if self.worker.child is not None and self.worker.child.asked is None:
            self.worker.child.stop(why)

    def died(self, child: Child, ending: Ending, again: bool) -> None:
        """Its process is dead. `again`: policy may start another."""
        child.dispose()
        self._context.runtime.release_metrics_id(child.metrics_id)
        Path(self._path).unlink(missing_ok=True)
        self.worker.died(ending, again and self.wanted and not self.on_trial)

    @property
    def on_trial(self) -> bool:
        """Its revision is not in force yet, and will not be without it."""
        return any(engine.on_trial for engine in self.replicas.engines)


class Visuals:
    """Belongs to the single-writer loop."""

    def __init__(self, context: Context, engines: Engines) -> None:
        self._context, self._engines = context, engines
        self._visuals: dict[int, Visual] = {}  # by revision

    def step(self) -> None:
        """After every event: those that should be there are, and no others."""
        wanted = {
            one.revision: one
            for one in self._engines.revisions
            if one.wanted and one.plan is not None and one.plan.vision is not None
        }
        for revision, visual in list(self._visuals.items()):
            if revision not in wanted:
                if visual.wanted:
                    visual.end("its engines are not in service")
                if visual.worker.child is None:
                    del self._visuals[revision]
        for revision, replicas in wanted.items():
            known = self._visuals.get(revision)
            if known is None:
                if not any(engine.worker.starts for engine in replicas.engines):
                    continue  # its turn has not come yet
                known = self._visuals[revision] = Visual(self._context, replicas)
                known.rename(self._name(replicas))
                known.worker.start()
            elif known.worker.child is None and (not known.wanted or (known.worker.down and not known.on_trial)):
                known.wanted = True
                known.worker.reset_failures()
            known.rename(self._name(replicas))

    def _name(self, replicas: Replicas) -> str:
        return f"{KIND}-0" if replicas is self._engines.serving else f"{KIND}-of-{replicas.revision}"

    def tick(self) -> None:
        """Starts what is due."""
        for visual in self._visuals.values():
            if visual.wanted:
                visual.worker.start_if_due()

    def children(self) -> list[Child]:
        """All living processes."""
        return [one.worker.child for one in self._visuals.values() if one.worker.child is not None]

    def owner(self, child: Child) -> Visual | None:
        """Whose process `child` is."""
        return next((one for one in self._visuals.values() if one.worker.child is child), None)

    @property
    def workers(self) -> list[Worker]:
        """Of all revisions."""
        return [one.worker for one in self._visuals.values()]

    def snapshots(self) -> list[WorkerStatus]:
        """As the control plane shows them."""
        return [worker.snapshot() for worker in self.workers]
