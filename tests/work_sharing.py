"""How the workers of `pytest -n 4` share the tests: those that hold seconds against a bound (real_time/) run first and
alone; then those of a file share a worker and its fixtures, and the first two workers have the trees of processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_AS_ONE = (
    "real_time",
    "systemd",
    "page",
)  # folders whose files stay together: alone on the machine, or with one fixture
_ONE_DAEMON = ("clients",)  # folders whose files share a daemon
_TREES = frozenset(
    {"test_api_process.py", "test_ctl_real_daemon.py", "test_real_gateway.py", "test_rolling_replacement.py"}
)
_SIMULATED = frozenset({"test_supervisor_model.py"})
# Those of most seconds of a core, the longest first; the files that are handed out last are to be short.
_LONG = (
    "test_supervisor_model.py",
    "test_kernels_compile_for_hopper.py",
    "test_beams_equal_transformers.py",
    "test_scheduler_fuzz.py",
    "test_device_steps.py",
    "test_device_runner.py",
    "test_offline.py",
    "test_branches_and_scores.py",
    "test_sleep.py",
    "test_fake_engine.py",
    "test_demo_model.py",
    "test_sampling_kernel.py",
    "test_sampler.py",
    "test_feature_pairs.py",
)


def starts_trees(file: str) -> bool:
    """Whether its tests start the daemon's tree of processes."""
    path = Path(file)
    if path.name in _SIMULATED:
        return False
    return path.parent.name in ("supervisor", "systemd", "page") or path.name in _TREES


def place(file: str) -> tuple[int, str]:
    """In the order of all files, which is otherwise that of their names: the longest of each worker's come first."""
    path = Path(file)
    if path.parent.name in _AS_ONE:
        return _AS_ONE.index(path.parent.name) - len(_AS_ONE), file
    return _LONG.index(path.name) if path.name in _LONG else len(_LONG), file


def share_compiling(config: Any) -> None:
    """Each worker begins to collect at another file. In a fresh clone all that the tests import is compiled then, and
    what one has compiled the others find; side by side, each would compile all of it."""
    worker, workers = (os.environ.get(f"PYTEST_XDIST_WORKER{of}", "") for of in ("", "_COUNT"))
    if not worker or config.args != config.getini("testpaths"):
        return
    files = sorted(str(file) for folder in config.args for file in Path(config.rootpath, folder).rglob("test_*.py"))
    first = len(files) * int(worker.removeprefix("gw")) // int(workers)
    config.args = files[first:] + files[:first]


def scheduler(*arguments: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        """The first worker takes the tests in real time, while the others wait; then the first half of the workers
        takes files that start trees as long as there are any, and the others take other files. One that has none of
        its own left takes what there is. Trees wait most of the time, so that two are work for one core."""

        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            folder = Path(file).parent.name
            return folder if folder in _AS_ONE + _ONE_DAEMON else file

        def _assign_work_unit(self, node: Any) -> None:
            if any(self._measures(other) for other in self.nodes if other is not node):
                return
            trees = node in self.nodes[: max(1, len(self.nodes) // 2)]
            scope = min(self.workqueue, key=lambda scope: self._has_trees(scope) is not trees)
            self.workqueue.move_to_end(scope, last=False)
            super()._assign_work_unit(node)

        def _has_trees(self, scope: str) -> bool:
            return scope in _AS_ONE + _ONE_DAEMON or starts_trees(scope)

        def _measures(self, node: Any) -> bool:
            return not all(self.assigned_work[node].get("real_time", {}).values())

        def mark_test_complete(self, node: Any, item_index: int, duration: float = 0) -> None:
            measured = self._measures(node)
            super().mark_test_complete(node, item_index, duration)
            if measured and not self._measures(node):
                for other in self.nodes * 2:  # each gets two files at first
                    self._reschedule(other)

    return Scheduler(*arguments)
