"""Which GPUs this process sees, where that has to be settled before CUDA starts in it."""

from __future__ import annotations

import os

from lightllmd.config.plan import Plan


def settle(plan: Plan) -> None:
    """The plan's numbers of GPUs are true from now on."""
    if plan.device.visible:
        os.environ["CUDA_VISIBLE_DEVICES"] = plan.device.visible
