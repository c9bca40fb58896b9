"""How the workers of `pytest -n 2` share the tests: the tests of a file share a worker and its fixtures, and the first
worker has the trees of processes to itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TREES = frozenset({"test_api_process.py", "test_ctl_real_daemon.py", "test_rolling_replacement.py"})
_SIMULATED = frozenset({"test_supervisor_model.py"})
# Those of most seconds of a core, the longest first; the files that are handed out last are to be short.
_LONG = (
    "test_supervisor_model.py",
    "test_scheduler_fuzz.py",
    "test_device_runner.py",
    "test_device_steps.py",
    "test_kernels_compile_for_hopper.py",
    "test_beams_equal_transformers.py",
    "test_offline.py",
    "test_branches_and_scores.py",
    "test_sampling_kernel.py",
    "test_demo_model.py",
    "test_fake_engine.py",
    "test_feature_pairs.py",
)


def starts_trees(file: str) -> bool:
    """Whether its tests start the daemon's tree of processes, or look at the clock."""
    path = Path(file)
    if path.name in _SIMULATED:
        return False
    return path.parent.name in ("supervisor", "systemd") or path.name in _TREES


def place(file: str) -> int:
    """In the order of all files, which is otherwise that of their names: the longest of each worker's come first."""
    path = Path(file)
    if path.parent.name == "systemd":
        return -1
    return _LONG.index(path.name) if path.name in _LONG else len(_LONG)


def scheduler(*arguments: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        """The first worker takes files that start trees as long as there are any, the others take other files; one
        that has none of its own left takes what there is. So one tree is on the machine, beside work for one core."""

        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "systemd" if Path(file).parent.name == "systemd" else file  # one booted machine for all of them

        def _assign_work_unit(self, node: Any) -> None:
            trees = node is self.nodes[0]
            scope = min(self.workqueue, key=lambda scope: (scope == "systemd" or starts_trees(scope)) is not trees)
            self.workqueue.move_to_end(scope, last=False)
            super()._assign_work_unit(node)

    return Scheduler(*arguments)
