"""Which runner computes a plan's steps: the one choice, made for the daemon's engine and for the offline interface."""

from __future__ import annotations

from lightllmd.config.plan import Plan
from lightllmd.engine import cache, fake, openmp
from lightllmd.engine.batch import Runner


def runner_for(plan: Plan) -> Runner:
    """A runner that has loaded nothing yet. Imports torch unless the back end is the fake one."""
    if plan.config.engine.backend == "fake":
        return fake.FakeRunner(plan.config.engine.fake)
    if plan.device.kind == "cuda":
        cache.settle(plan)
        from lightllmd.engine.device_runner import DeviceRunner

        return DeviceRunner()
    openmp.settle()
    from lightllmd.engine.runner import TorchRunner

    return TorchRunner()
